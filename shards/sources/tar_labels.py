"""Where the class of an image in a tar comes from: what its sample says, the folder that holds it, or the tar's own name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from shards.sources.source_options import TarOptions

_ORIGINS = {
    "sample": "what each sample says itself",
    "folder": "the folders in the tars",
    "tar": "the names of the tars",
}


@dataclass(frozen=True)
class Rule:
    """kind: auto, sample, folder, tar or none; depth: of the folder, from 1 at the left, or 0 for the one that holds the image."""

    kind: str
    depth: int

    @classmethod
    def of(cls, options: TarOptions) -> Rule:
        """The rule that `--label-from` names."""
        kind, _, depth = options.label_from.partition(":")
        return cls(kind, int(depth or 0))

    @property
    def asks_sample(self) -> bool:
        """Whether the `.json` and `.cls` members count."""
        return self.kind in ("auto", "sample")

    def label(self, said: str | None, name: str, tars: list[str], *, plain: bool) -> tuple[str, str | None]:
        """(sample, folder or tar: what gave it, the class of the image `name`); None where it has none.

        said: by its sample; tars: the names of the tars that it lies in, the outermost first; plain: whether the tar is an archive of
        images rather than of WebDataset samples, so that its folders are classes.
        """
        match self.kind:
            case "folder":
                return "folder", self._folder(name)
            case "tar":
                return "tar", _stem(tars[-1])
            case "none":
                return "none", None
        if said is not None or self.kind == "sample" or not plain:
            return "sample", said
        if folder := self._folder(name):
            return "folder", folder
        return "tar", _stem(tars[-1]) if len(tars) > 1 else None

    def _folder(self, name: str) -> str | None:
        folders = [part for part in name.split("/")[:-1] if part not in ("", ".", "..")]
        at = self.depth - 1 if self.depth else len(folders) - 1
        return folders[at] if 0 <= at < len(folders) else None


def describe(origins: Counter[str]) -> str:
    """A sentence about where the classes came from; `origins` counts the images that have one."""
    if not origins:
        return "No image has a class: --label-from folder, or tar, takes the names of the folders, or of the tars."
    said = " and ".join(_ORIGINS[origin] for origin in sorted(origins))
    return f"Classes: {said}; --label-from changes that."


def _stem(tar: str) -> str:
    name = tar.rpartition("/")[2]
    return name[:-4] if name.lower().endswith(".tar") else name
