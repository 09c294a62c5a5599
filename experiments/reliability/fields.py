"""Part `fields`: wrong configurations, each of which must end in a line that names the field or the file.

Everything is imported once; each configuration is then tried in a forked child, which has trained nothing when it ends.
"""

from __future__ import annotations

import copy
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from reliability.mini import write

COUNT = 1000

OTHER_KINDS: tuple[Any, ...] = (
    "text",
    -1,
    1.5,
    [1, 2],
    {"a": 1},
    True,
    [],
    {},
    "",
    10**30,
    float("nan"),
    float("inf"),
    [["x"]],
)
"""Values, of which those of another type than the field's are wrong anywhere."""

RANGES: dict[str, tuple[Any, ...]] = {
    "threads": (0, -3),
    "seed_everything": (-1, 2**32),
    "setting": ("..", "a/b", "", "x" * 300, "a\nb", ".hidden", "a\\b", "C:"),
    "method": ("../..", "a/b", "\x1b[31m"),
    "federation.rounds": (0, -1),
    "federation.clients_per_round": (0, 3, -1),
    "data.split.clients": (0, -2, 10**6),
    "data.split.tasks": (0, 7),
    "data.split.classes_per_task": (0, 5),
    "data.split.private_classes": (-1, 6),
    "data.split.dirichlet_alpha": (0.0, -1.0, float("nan"), float("inf")),
    "data.split.min_public_images": (-1, 1000),
    "data.split.train_per_class": (0,),
    "data.device_mib": (-1.0, float("nan"), float("inf")),
    "backbone.image_size": (0, -5, 10**7),
    "backbone.mean": ([0.5], [123.0, 116.0, 103.0], [0.5, 0.5, float("nan")], [-0.1, 0.5, 0.5], []),
    "backbone.std": ([0.0, 0.5, 0.5], [58.0, 57.0, 57.0], [0.5] * 4, [float("inf")] * 3, [-1.0, 1.0, 1.0]),
    "backbone.cache_mib": (-1.0, float("nan"), float("inf")),
    "backbone.name": ("vit_nothing", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "resnet18", "../x", ""),
    "backbone.model_args.depth": (0, -1),
    "backbone.model_args.num_heads": (0, 5, 7),
    "backbone.model_args.patch_size": (0, 64),
    "backbone.model_args.checkpoint_path": ("evil.pt",),
    "backbone.model_args.pretrained_cfg": ({"file": "evil.pt"}, {"url": "http://localhost/"}),
    "backbone.model_args.pretrained_cfg_overlay": ({"file": "evil.pt"},),
    "backbone.model_args.features_only": (True,),
    "backbone.model_args.in_chans": (1, 4),
    "backbone.model_args.img_size": (64,),
    "backbone.model_args.norm_layer": ("nothing",),
    "cnn.name": ("nothing", "swin_tiny_patch4_window7_224", [], ["resnet18"], ["resnet18"] * 3),
    "cnn.features": (0, -1, 10**9),
    "cnn.image_size": (0, -1, 10**6),
    "cnn.model_args.channels": ([8], [0, 0, 0, 0], "x", [-1, 2, 3, 4]),
    "cnn.model_args.checkpoint_path": ("evil.pt",),
    "cnn.model_args.num_classes": (10,),
    "cnn.model_args.norm_layer": ("nothing",),
    "trainer.accelerator": ("tpu", "quantum", ""),
    "trainer.precision": ("64", "8"),
    "tracking.project": ("a/b", "", "x" * 200, "a#b"),
    "tracking.wandb_mode": ("sometimes",),
    "model.class_path": ("FedLSLC", "os.system", "ExactO2D", "nowhere.at.All", "3"),
    "model.init_args.epochs": (0, -1),
    "model.init_args.batch_size": (1, 0, -1),
    "model.init_args.evaluation_batch_size": (0,),
    "model.init_args.learning_rate": (-1.0, float("nan"), float("inf")),
    "model.init_args.gradient_clip": (0.0, -1.0, float("nan")),
    "model.init_args.buffer_size": (-1,),
    "model.init_args.block": (-1, 4, 1000),
    "model.init_args.rank": (0, -1),
    "model.init_args.train_mask": ("all",),
    "model.init_args.continual.class_path": ("Nothing", "FedLSCL"),
    "model.init_args.continual.init_args.passes": (-1,),
    "server.class_path": ("Nothing", "FedLSCL", "GLFCServer"),
    "server.init_args.strength": (-1.0, float("nan"), float("inf")),
    "data.source.class_path": ("Nothing", "Replay"),
    "data.source.init_args.size": (0, -1),
}
"""Wrong values of the type that a field has."""

NEEDED = ("data.source", "data.source.init_args.root", "data.source.init_args.size", "model", "server")


class Case(NamedTuple):
    """A wrong configuration.

    Args:
        what: what is wrong with it.
        words: the command line.
        named: texts of which the answer must have one.
    """

    what: str
    words: list[str]
    named: tuple[str, ...]


def fields(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields, groups too."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from fields(value, f"{prefix}{key}.")


def changed(values: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A configuration with another value of one field."""
    new: dict[str, Any] = copy.deepcopy(values)
    *groups, last = field.split(".")
    inner = new
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[last] = value
    return new


def without(values: dict[str, Any], field: str) -> dict[str, Any]:
    """A configuration without a field."""
    new = copy.deepcopy(values)
    *groups, last = field.split(".")
    inner = new
    for group in groups:
        inner = inner[group]
    del inner[last]
    return new


def get(values: dict[str, Any], field: str) -> Any:
    """The value of a field."""
    for group in field.split("."):
        values = values[group]
    return values


def wrong_kind(value: Any, other: Any) -> bool:
    """Whether a value is certainly of another kind than the one that a field has."""
    if isinstance(value, bool):
        return not isinstance(other, bool)
    if isinstance(value, int):
        return isinstance(other, bool) or not isinstance(other, int) or abs(other) > 2**63
    if isinstance(value, str):
        return not isinstance(other, str)
    if isinstance(value, dict):
        return not isinstance(other, dict)
    return not isinstance(other, list) or other == [["x"]]


def last_names(field: str) -> tuple[str, ...]:
    """What may stand for a field in an answer: its own name or its group's."""
    parts = [part for part in field.split(".") if part not in ("init_args", "class_path")]
    return tuple(parts[-2:]) if parts[-2:-1] and parts[-2] not in ("data", "split") else tuple(parts[-1:])


def draw(rng: random.Random, mini: Path, folder: Path, number: int) -> Case:
    """One wrong configuration, written to a file of its own where it is one."""
    values: dict[str, Any] = yaml.safe_load(mini.read_text())
    file = folder / f"case{number}.yaml"

    def case(what: str, new: Any, *named: str) -> Case:
        file.write_text(yaml.safe_dump(new, sort_keys=False, allow_unicode=False))
        return Case(what, ["--config", str(file)], named)

    def kind() -> Case:
        skipped = ("model_args", "cache_dir", "setting", "method")  # of any kind, or texts of which most are right
        field = rng.choice([name for name in fields(values) if not any(part in name for part in skipped)])
        other = rng.choice([o for o in OTHER_KINDS if wrong_kind(get(values, field), o)])
        return case(f"{field}: {other!r}", changed(values, field, other), *last_names(field))

    def outside() -> Case:
        field = rng.choice(sorted(RANGES))
        value = rng.choice(RANGES[field])
        return case(f"{field}: {value!r}", changed(values, field, value), *last_names(field), *field.split(".")[:1])

    def word() -> Case:
        field = rng.choice([name for name in sorted(RANGES) if "model_args" not in name and "class_path" not in name])
        wrong = rng.choice([value for value in RANGES[field] if value != ""])  # whose '' would be two quotes here
        value = yaml.safe_dump(wrong, default_flow_style=True, width=10**6).split("\n...")[0].strip()
        name = field.replace(".init_args", "")
        return Case(f"--{name}={value}", ["--config", str(mini), f"--{name}={value}"], (*last_names(field), "data"))

    def missing() -> Case:
        field = rng.choice(NEEDED)
        return case(f"without {field}", without(values, field), *last_names(field), "source")

    def unknown() -> Case:
        group = rng.choice([name for name in fields(values) if isinstance(get(values, name), dict)])
        name = "".join(rng.choices("abcdefgh_", k=rng.randrange(3, 12))) + rng.choice(
            ["x", "\N{LATIN SMALL LETTER E WITH ACUTE}", "-"]
        )
        new = changed(values, f"{group}.{name}", rng.choice([3, "text", None, [1]]))
        return case(f"{group}.{name}", new, name, ascii(name)[1:-1])

    def path() -> Case:
        nowhere = rng.choice(
            ["/nowhere/at/all", str(folder), "/dev/null", "~nobody-here/x", "nul\0l", "x" * 5000, str(file)]
        )
        field = rng.choice(["data.source.init_args.root", "backbone.weights", "run_dir", "data.cache_dir"])
        if field == "run_dir" and nowhere in (str(folder), str(file)):
            nowhere = "/dev/null/run"
        if field == "data.cache_dir" and nowhere in (str(folder), "/nowhere/at/all", "x" * 5000, str(file)):
            nowhere = "/proc/nowhere"
        if field == "run_dir" and nowhere == "/nowhere/at/all":
            nowhere = "/proc/nowhere"
        new = changed(values, field, nowhere)
        return case(f"{field}: {nowhere[:40]!r}", new, field.split(".")[-1], nowhere[:40], nowhere[:5])

    def text() -> Case:
        content = mini.read_text()
        at = rng.randrange(len(content))
        damage = rng.choice(["cut", "tab", "bracket", "colon", "empty", "list", "word", "tag", "recursive", "number"])
        other = {
            "cut": content[:20] + "[",
            "tab": content.replace("  ", "\t", 1),
            "bracket": content + "a: [1, 2\n",
            "colon": content + "a: b: c\n",
            "empty": rng.choice(["", "\n", "# nothing\n", "---\n"]),
            "list": "- 1\n- 2\n",
            "word": "just a text",
            "tag": content + "cnn: !!python/object/apply:os.system [ls]\n",
            "recursive": content + "x: &a [*a]\n",
            "number": "7",
        }[damage]
        file.write_text(other)
        return Case(f"YAML: {damage} at {at}", ["--config", str(file)], (str(file), "config"))

    def encoding() -> Case:
        how = rng.choice(["latin-1", "utf-16", "nul", "binary"])
        content = mini.read_text() + "# na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve\n"
        encoded = {"nul": b"a: \0\n", "binary": rng.randbytes(64) + b"\xff\xfe\x81"}.get(how)
        file.write_bytes(encoded if encoded is not None else content.encode(how))
        return Case(f"encoding: {how}", ["--config", str(file)], (str(file),))

    def words() -> Case:
        given = rng.choice(
            [
                ["--config"],
                ["--config", "/nowhere.yaml"],
                ["--config", str(folder)],
                ["stray"],
                ["--federation.roundz=3"],
            ]
        )
        return Case(f"words: {given}", ["--config", str(mini), *given], ("config", "stray", "roundz"))

    kinds: list[Callable[[], Case]] = [kind, kind, outside, outside, outside, word, word]
    return rng.choice([*kinds, missing, unknown, path, text, encoding, words])()


class Answer(NamedTuple):
    """How a command ended."""

    code: int
    text: str


def tried(words: list[str], folder: Path) -> Answer:
    """Run `fedlscl fit` in a child of this process, which has imported everything."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            os.chdir(folder)
            code = ended(["fit", *words])
            sys.stdout.flush()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    return Answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text)


def ended(words: list[str]) -> int:
    """The exit code of a command, without training: what would train ends with code 0."""
    from fedlscl.cli import main
    from fedlscl.federation.algorithm import Federation

    Federation.run = lambda *_: iter(())  # type: ignore[method-assign]
    try:
        main(words)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0 if isinstance(end.code, int) else 0
    return 0


def problem(case: Case, answer: Answer) -> str | None:
    """What is wrong with an answer, if anything is."""
    text = answer.text.strip()
    if answer.code == 0 or "KeyError: 'history'" in text:
        return "not refused"
    if answer.code not in (1, 2):
        return f"exit code {answer.code}"
    if "Traceback" in text:
        return "traceback"
    if len(text.splitlines()) != 1 or not text.startswith("fedlscl: "):
        return f"{len(text.splitlines())} lines"
    if not any(name in text for name in case.named if name):
        return "names neither field nor file"
    return None


def run(folder: Path, seed: int, count: int) -> tuple[str, int]:
    """Try `count` wrong configurations.

    Args:
        folder: an empty folder.
        seed: of what is drawn.
        count: how many.

    Returns:
        What was found, as Markdown, and the number of faults.
    """
    import timm  # noqa: F401

    import fedlscl.run.configuration
    import fedlscl.run.experiment  # noqa: F401

    mini, rng = write(folder), random.Random(seed)
    codes: Counter[int] = Counter()
    faults: list[str] = []
    longest: list[tuple[int, str, str]] = []
    for number in range(count):
        case = draw(rng, mini, folder, number)
        answer = tried(case.words, folder)
        codes[answer.code] += 1
        text = re.sub(re.escape(str(folder)), "FOLDER", answer.text.strip())
        if found := problem(case, answer):
            faults.append(f"- {found}: `{case.what[:120]}`: `{text[-300:]!r}`")
        longest.append((len(text), case.what, text))
    lines = [
        f"{count} wrong configurations (values of another type or outside their range, fields missing or unknown, "
        "paths, YAML and encodings that are none), each tried in a process of its own: a fault is what is not refused "
        "before training, has a traceback or more than a line, or names neither field nor file.",
        f"Refused with exit code {' and '.join(f'{code}: {n}' for code, n in sorted(codes.items()))}; "
        f"faults: {len(faults)}.",
        "\n".join(faults[:20]),
        "The longest answers, the worst to read:",
        "\n".join(f"- `{what[:80]}`: {text[:600]}" for _, what, text in sorted(dict.fromkeys(longest))[-3:]),
    ]
    return "\n\n".join(filter(None, lines)), len(faults)
