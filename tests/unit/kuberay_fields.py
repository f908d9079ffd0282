"""The fields of KubeRay's RayJob (ray.io/v1, as of KubeRay 1.5) around its pods, which Kubernetes' own schema checks.

KubeRay publishes its definition with its Helm chart only, so these are written down by hand from its API reference:
https://ray-project.github.io/kuberay/reference/api/
"""

from __future__ import annotations

from typing import Any

TEXT, COUNT, FLAG, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def fields(required: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


GROUP = {
    "rayStartParams": TEXTS,
    "template": fields(("spec",), metadata=ANY, spec=ANY),
    "resources": TEXTS,
    "labels": TEXTS,
}

HEAD_GROUP = fields(
    ("rayStartParams", "template"),
    **GROUP,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    headService=ANY,
    enableIngress=FLAG,
)

WORKER_GROUP = fields(
    ("groupName", "rayStartParams", "template"),
    **GROUP,
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    suspend=FLAG,
    scaleStrategy=ANY,
)

RAY_CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["token", "disabled"]}),
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP, "minItems": 1},
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=ANY,
    headServiceAnnotations=TEXTS,
    gcsFaultToleranceOptions=ANY,
    managedBy=TEXT,
    suspend=FLAG,
    upgradeStrategy=ANY,
)

RAY_JOB = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(("name",), name={"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}, namespace=TEXT, labels=TEXTS),
    spec=fields(
        ("entrypoint", "rayClusterSpec"),
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        clusterSelector=TEXTS,
        deletionStrategy=ANY,
        entrypoint=TEXT,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources=TEXT,
        jobId=TEXT,
        managedBy=TEXT,
        metadata=TEXTS,
        rayClusterSpec=RAY_CLUSTER,
        runtimeEnvYAML=TEXT,
        shutdownAfterJobFinishes=FLAG,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig=fields(backoffLimit=COUNT),
        submitterPodTemplate=ANY,
        suspend=FLAG,
        ttlSecondsAfterFinished=COUNT,
    ),
)
