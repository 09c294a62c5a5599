"""A table of image files and their classes, as a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

from fedlscl.data.cache import Files, load_images
from fedlscl.data.cutting import cut_parts, test_part
from fedlscl.data.folders import ImageFiles
from fedlscl.data.source import Dataset
from fedlscl.data.temporary import sweep

PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
"""What a column of parts may say; other words, such as ``val``, are refused."""

COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image", "image_path"),
    "label": ("label", "class", "category", "target"),
    "part": ("part", "split"),
}
"""How columns are called that are found by themselves."""

MAX_ROWS = 10_000_000


class ImageTable(ImageFiles):
    """Image files that a CSV file lists, with the class of each; class ids follow the sorted names of the classes.

    The file has a header. Where no column says what is for testing, a random part of each class, the same in every
    run, is; see `cut_parts`.
    """

    def __init__(
        self,
        root: str,
        size: int,
        folder: str | None = None,
        path: str | None = None,
        label: str | None = None,
        part: str | None = None,
        name: str | None = None,
        expected_classes: int | None = None,
        background: str | tuple[int, int, int] = "white",
        value_range: tuple[float, float] | None = None,
        test_fraction: float | None = None,
    ) -> None:
        """Name what to read.

        Args:
            root: the CSV file, in UTF-8, with commas or, where the header has none, semicolons or tabs.
            size: side in pixels that images are decoded to.
            folder: what paths are relative to; None = the file's folder.
            path: the column of paths; None = that which is called path, file, filename, file_name, image or image_path.
            label: the column of classes; None = that which is called label, class, category or target.
            part: the column that says train or test; None = that which is called part or split, if there is one.
            name: name of the data set; None = the file's.
            expected_classes: refuse any other number of classes; None = any.
            background: colour behind transparent images. See ImageFolder.
            value_range: values that are black and white in images that do not say it themselves. See ImageFolder.
            test_fraction: the part of each class that is for testing where no column says it, above 0 and below 1;
                None = 0.2.
        """
        super().__init__(root, size, expected_classes, background, value_range)
        self.folder = self.root.parent if folder is None else Path(folder).expanduser()
        self.columns = {"path": path, "label": label, "part": part}
        self.name = name
        self.test_fraction = test_part("test_fraction", test_fraction)

    def load(self, cache_dir: Path) -> Dataset:
        """Return the images of the table, decoded or from the cache.

        Raises:
            FileNotFoundError: the table is missing, or an image.
            ValueError: it is no such table, a class is not in both parts, or images cannot be read.
        """
        sweep(cache_dir)
        parts = self.parts(cache_dir)
        train, test = load_images("imagetable", self.decoder, self.folder, parts, cache_dir)
        return Dataset(self.name or self.root.stem, train, test, tuple(parts[0].by_class))

    def parts(self, cache_dir: Path) -> tuple[Files, Files]:
        """The files of training and of test images by class, as `load` reads them; raises what it raises of them."""
        rows = self._rows()
        classes = sorted({label for _, label, _ in rows})
        if self.expected_classes is not None and len(classes) != self.expected_classes:
            raise ValueError(f"{self.root} has {len(classes)} classes, expected {self.expected_classes}")
        found: dict[str, dict[str, list[Path]]] = {
            part: {label: [] for label in classes} for part in dict.fromkeys(part for _, _, part in rows)
        }
        for path, label, part in sorted(rows):
            found[part][label].append(path)
        if list(found) == [""]:
            return cut_parts("imagetable", found[""], self.folder, self.test_fraction, cache_dir)
        for part in ("train", "test"):
            if lacking := [label for label in classes if not found.get(part, {}).get(label)]:
                raise ValueError(f"{self.root}: class '{lacking[0]}' has no image for '{part}'; each needs some")
        return Files("train", found["train"]), Files("test", found["test"])

    def _rows(self) -> list[tuple[Path, str, str]]:
        """Path, class and part of every row; the part is empty where no column says it."""
        if not self.root.is_file():
            raise FileNotFoundError(f"{self.root} is not there; it must be a CSV file of paths and classes")
        rows: list[tuple[Path, str, str]] = []
        lines: dict[Path, int] = {}
        try:
            with self.root.open(encoding="utf-8-sig", newline="") as file:
                header = file.readline()
                separator = next((sign for sign in ",;\t" if sign in header), ",")
                file.seek(0)
                table = csv.reader(file, delimiter=separator)
                places = self._places([cell.strip() for cell in next(table, [])])
                for row in table:
                    if not row:
                        continue
                    if len(rows) == MAX_ROWS:
                        raise ValueError(f"{self.root} has more than {MAX_ROWS:,} rows")
                    where = f"{self.root}, line {table.line_num}"
                    if len(row) <= max(places.values()):
                        raise ValueError(f"{where} has {len(row)} cells, fewer than the header")
                    path, label = self.folder / row[places["path"]].strip(), row[places["label"]].strip()
                    if not label or not row[places["path"]].strip():
                        raise ValueError(f"{where}: path or class is empty")
                    part = ""
                    if "part" in places and (part := PARTS.get(row[places["part"]].strip().lower(), "")) == "":
                        raise ValueError(f"{where}: '{row[places['part']]}' is no part; it must be train or test")
                    if (other := lines.setdefault(path, table.line_num)) != table.line_num:
                        raise ValueError(f"{where}: {path} is in line {other} already; each image must be there once")
                    rows.append((path, label, part))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.root} is not text in UTF-8 ({error.reason}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(f"{self.root} cannot be read as CSV ({error})") from error
        if not rows:
            raise ValueError(f"{self.root} has a header and no rows; each row must be the path and class of an image")
        return rows

    def _places(self, header: list[str]) -> dict[str, int]:
        """The number of each column that is needed or there."""
        places = {}
        for what, given in self.columns.items():
            names = (given,) if given is not None else COLUMNS[what]
            found = [place for place, cell in enumerate(header) if (cell if given else cell.lower()) in names]
            if len(found) == 1:
                places[what] = found[0]
            elif found or given is not None or what != "part":
                wanted = f"one column called {' or '.join(names)}"
                raise ValueError(
                    f"{self.root}: the header is {', '.join(header) or 'empty'}; it must have {wanted}, or "
                    f"data.source.{what} must name one"
                )
        return places
