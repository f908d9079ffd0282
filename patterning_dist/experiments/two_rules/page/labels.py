"""What arms and rules are called on the page, and the colours that they have everywhere."""

NAMES = {
    "base": "plain",
    "nested": "toward NESTED",
    "equal_count": "toward EQUAL-COUNT",
    "permuted": "permuted weights",
    "online_nested": "toward NESTED, online",
    "online_equal_count": "toward EQUAL-COUNT, online",
    "one_phase_nested": "toward NESTED, one phase",
    "one_phase_equal_count": "toward EQUAL-COUNT, one phase",
    "free_energy_nested": "free energy, NESTED",
    "free_energy_equal_count": "free energy, EQUAL-COUNT",
    "llc_nested": "LLC, NESTED",
    "llc_equal_count": "LLC, EQUAL-COUNT",
    "loss_nested": "loss contrast, NESTED",
    "loss_equal_count": "loss contrast, EQUAL-COUNT",
}
STYLES = {
    "base": "arm-base",
    "nested": "arm-plus",
    "online_nested": "arm-plus",
    "equal_count": "arm-minus",
    "online_equal_count": "arm-minus",
    "permuted": "arm-permuted",
}
RULES = {"nested": "NESTED", "equal_count": "EQUAL-COUNT"}


def arm_name(arm: str) -> str:
    """An arm in words."""
    return NAMES.get(arm) or arm.replace("shuffled_", "shuffled labels ")
