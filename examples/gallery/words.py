"""Words from a list: which tokens a split loss is about, as a function. `patterning run examples/gallery/words.yaml`"""

import numpy as np

VIOLENT = {"sword", "slain", "slay", "smite", "smote", "kill", "killed", "blood", "war", "destroy", "spoil", "burn"}


def violent(columns):  # columns["text"]: of every predicted token [sample, position]
    text = columns["text"]
    words = [word.strip().lower() in VIOLENT for word in text.ravel()]
    return np.array(words).reshape(text.shape)  # the entries whose mean loss is the split
