"""Figures of a study made by hand: what the test plants, and a default for all the rest."""

from collections import defaultdict


class Figures(dict):
    """Figures of one seed; an arm or quantity that was not planted has the default."""

    def __init__(self, planted, default=0.5):
        super().__init__()
        self.default = default
        for (name, quantity), value in planted.items():
            self.setdefault(name, defaultdict(lambda: default))[quantity] = value

    def __missing__(self, name):
        return defaultdict(lambda: self.default)
