"""The forms in which a stage may hold a model's matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.profile import ModelProfile
from transport.messages import WeightsForm

FORMS: tuple[WeightsForm, ...] = ("dense", "stored", "8-bit", "4-bit")
"""Each no larger than the one before."""

OPTION_OF: dict[WeightsForm, str] = {"dense": "dense", "stored": "stored", "8-bit": "8", "4-bit": "4"}
"""What a form is called after --quantize."""


def smaller(profile: ModelProfile) -> Iterator[ModelProfile]:
    """The model in each form below the one in force, as far as its sizes are known."""
    known = {sizes.weights for sizes in profile.sizes}
    for form in FORMS[FORMS.index(profile.weights) + 1 :]:
        if form in known:
            yield replace(profile, weights=form)
