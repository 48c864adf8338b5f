"""How the delivered model of an update compares with the earlier sweep's, in update.json, terminal and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from imbvlm.base import storage
from imbvlm.base.formatting import join_limited, percent, pluralize
from imbvlm.base.json_file import read_json
from imbvlm.base.text_tables import table
from imbvlm.longtail.group_gap import group_note
from imbvlm.longtail.model_change import AccuracyChange, ClassChange
from imbvlm.sweep.records.trial_log import resume_fix
from imbvlm.sweep.report.plotting import Table

UPDATE_FILE = "update.json"
# Classes that the terminal shows; the report and the file have all of them.
NUM_SHOWN = 10
BALANCED = "balanced"


@dataclass(frozen=True)
class ComparedClass:
    """A class that both models can name, with its training images before and now, and its test images' change."""

    name: str
    num_train_before: int
    num_train_now: int
    change: ClassChange


@dataclass(frozen=True)
class NewClass:
    """A class that the earlier model can't name, and how many of its test images are right now."""

    name: str
    num_images: int
    num_right: int


@dataclass(frozen=True)
class UpdateComparison:
    """Both delivered models on the same test images, of the classes that both can name.

    `earlier` is the earlier sweep's folder and `delivered` the compared model's id. `num_seen` images were left out,
    since a model was trained or selected with them, and `num_unread` since they couldn't be read. Shot groups are those
    of the earlier training. `problem` is the reason where nothing could be compared.
    """

    earlier: str
    delivered: str = ""
    problem: str = ""
    num_seen: int = 0
    num_unread: int = 0
    accuracies: Mapping[str, AccuracyChange] = field(default_factory=dict)
    classes: Sequence[ComparedClass] = ()
    new: Sequence[NewClass] = ()
    gone: Sequence[str] = ()

    def write(self, folder: str) -> None:
        """Write update.json into a sweep's folder."""
        storage.write_json(storage.join(folder, UPDATE_FILE), asdict(self))

    @staticmethod
    def read(folder: str) -> UpdateComparison | None:
        """The comparison of a sweep's folder; None where there is none. Raises ImbvlmError for a damaged file."""
        return read_json(storage.join(folder, UPDATE_FILE), _parse, resume_fix(folder))

    @property
    def verdict(self) -> str:
        """A sentence on the change in balanced accuracy."""
        change = self.accuracies[BALANCED]
        if change.interval is None:
            return f"whether that is more than chance isn't known: {group_note(change.num_groups)}."
        low, high = change.interval
        if low > 0:
            return "the new model is better: the interval of balanced accuracy is above 0."
        if high < 0:
            return "the new model is worse: the interval of balanced accuracy is below 0."
        return "no difference is shown: the interval of balanced accuracy includes 0, so that it may be chance."

    @property
    def notes(self) -> list[str]:
        """Sentences on what was compared, what was left out, and classes that came and went."""
        left_out = [
            f"left out: {pluralize(number, 'test image')} that {reason}." if number else ""
            for number, reason in (
                (self.num_seen, "one of the models was trained or selected with"),
                (self.num_unread, "couldn't be read"),
            )
        ]
        scored = [f"{own.name} {percent(own.num_right / own.num_images)}" for own in self.new if own.num_images]
        unscored = [own.name for own in self.new if not own.num_images]
        classes = [
            f"new classes, which the earlier model can't name, right now (%): {join_limited(scored)}."
            if scored
            else "",
            f"new classes without test images: {join_limited(unscored)}." if unscored else "",
            f"classes that are gone: {join_limited(self.gone)}." if self.gone else "",
        ]
        return [note for note in (*left_out, *classes) if note]

    def describe(self, width: int) -> str:
        """The comparison as text of so many columns."""
        if self.problem:
            return f"the model isn't compared with that of {self.earlier}: {self.problem}"
        accuracies, classes = self.tables
        num_images = self.accuracies[BALANCED].num_images
        parts = [
            f"the model that {self.earlier} delivered (before) and this one (now) on the same "
            f"{pluralize(num_images, 'test image')} (%):",
            table(accuracies.header, accuracies.rows, width),
            self.verdict,
            *self.notes,
            "by class, the clearest changes first:",
            table(classes.header, classes.rows[:NUM_SHOWN], width),
        ]
        more = len(classes.rows) - NUM_SHOWN
        return "\n".join([*parts, *([f"and {pluralize(more, 'class')} more; the report has all"] if more > 0 else [])])

    @property
    def tables(self) -> Sequence[Table]:
        """Accuracies, and classes with the clearest change first; none where nothing could be compared."""
        if self.problem:
            return ()
        accuracies = [
            [
                ("" if name == BALANCED else "was ") + name.replace("_", "-"),
                percent(change.before),
                percent(change.after),
                f"{100 * change.difference:+.1f}",
                "-" if change.interval is None else " to ".join(f"{100 * end:+.1f}" for end in change.interval),
                str(change.num_classes),
            ]
            for name, change in self.accuracies.items()
        ]
        classes = [
            [
                own.name,
                f"{own.num_train_before:,} to {own.num_train_now:,}",
                str(own.change.num_images),
                percent(own.change.num_before / own.change.num_images),
                percent(own.change.num_after / own.change.num_images),
                str(own.change.num_gained),
                str(own.change.num_lost),
            ]
            for own in self.classes
        ]
        groups = group_note(self.accuracies[BALANCED].num_groups)
        caption = (
            f"Percent of the same test images by the model that {self.earlier} delivered (before) and by this one "
            "(now), of the classes that both can name. Shot groups are those of the earlier training. The interval is "
            f"that of a paired bootstrap{f': {groups}' if groups else ''}. "
        )
        caption += " ".join(note[0].upper() + note[1:] for note in (self.verdict, *self.notes))
        header = ["what", "before", "now", "change", "95 % interval", "classes"]
        of_classes = ["class", "training images", "test images", "before", "now", "gained", "lost"]
        return (
            Table("update", "Compared with the earlier model", header, accuracies, caption=caption),
            Table(
                "update_classes",
                "What changed by class",
                of_classes,
                classes,
                2,
                "The clearest changes first. Gained images are right now and weren't; lost ones were right and aren't.",
            ),
        )


def _parse(content: Any) -> UpdateComparison:
    accuracies = {
        name: AccuracyChange(**{**change, "interval": change["interval"] and tuple(change["interval"])})
        for name, change in content["accuracies"].items()
    }
    classes = [ComparedClass(**{**own, "change": ClassChange(**own["change"])}) for own in content["classes"]]
    new = [NewClass(**own) for own in content["new"]]
    return UpdateComparison(**{**content, "accuracies": accuracies, "classes": classes, "new": new})
