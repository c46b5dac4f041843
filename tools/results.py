"""make results: the runs behind docs/results.md, each skipped if it is already there. Prints the table.

python -m tools.results [data=../shared/data] [only=cifar10,fsdd,agnews-small,methods,masked,longer,finetune,NAME]

`methods` stands for all joint-embedding methods on the same 10 000 images with the same small encoder, 3 minutes each; `masked`
for all masked and predictive methods on images, speech, spectrograms and text, about 2 minutes each, named MODALITY-METHOD;
`longer` for the best of each modality, about 15 minutes each; `finetune` for what labels make of
some encoders, and of fresh weights, in a table of its own.
What a run cost is in its cost.json: seconds of processor time of training, children included; of a killed attempt nothing.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from mmssl.config import shipped_recipes
from mmssl.evaluate.probe import probe
from mmssl.methods import METHODS
from mmssl.training.run_folder import RunFolder
from tools.demo import call
from tools.digits import DIGITS, write


class Result(NamedTuple):
    """One data set and how it is learned."""

    recipe: str
    data: str
    samples: int  # at most, of each split in the probe
    words: tuple[str, ...] = ()
    vocabulary: int = 0  # of a tokenizer to train first
    group: str | None = None  # column whose values are left out one by one in a further linear probe
    pairs: bool = False  # whether recordings are bound to their words, and recognised by them in the voice of a new speaker


RESULTS = {
    "cifar10": Result("vision/data2vec2-cifar10-cpu", "cifar10", 50_000),
    "cifar10-data2vec1": Result("vision/data2vec1-cifar10-cpu", "cifar10", 50_000),
    "fsdd": Result("speech/data2vec2-fsdd-cpu", "fsdd", 5_000, group="speaker"),
    "fsdd-bind": Result("multimodal/bind-fsdd-cpu", "fsdd", 500, vocabulary=26, pairs=True),
    "agnews-small": Result("text/data2vec2-agnews-cpu", "agnews-small", 10_000, vocabulary=4000),
}
COMPARED = [name for name, method in METHODS.items() if method.family == "joint embedding"]
RESULTS |= {name: Result(f"vision/{name}-cifar10-cpu", "cifar10", 5_000) for name in COMPARED}
PLACES = {  # modality: what its small recipes end in, and how they are learned
    "vision": ("cifar10-cpu", Result("", "cifar10", 5_000, words=("data.limit=10000",))),
    "speech": ("fsdd-cpu", Result("", "fsdd", 5_000, group="speaker")),
    "spectrogram": ("fsdd-cpu", Result("", "fsdd", 5_000, group="speaker")),
    "text": ("agnews-cpu", Result("", "agnews-small", 5_000, vocabulary=4000)),
}
LONGER = {  # the best of a modality, more updates of it, and pictures on the way
    "vision-mae": ("train.steps=5500", "watch.every=1000", "watch.samples=5000"),
    "spectrogram-tera": ("train.steps=3000", "watch.every=600", "save.every=600"),
    "text-causal_lm": ("train.steps=2400", "watch.every=600", "save.every=600"),
}
FOLDER = Path("runs/results")


class Tuned(NamedTuple):
    """A fine-tuning run of an encoder of another."""

    recipe: str
    encoder: str
    data: str
    words: tuple[str, ...]
    score: str  # in results.json


TUNED = {
    "finetune-images": Tuned(
        "finetune/image-classification",
        "longer-vision-mae",
        "cifar10",
        ("data.labels=100", "watch.samples=2000", "train.epochs=12", "views.mixup=0", "views.cutmix=0", "views.randaugment=0"),
        "accuracy",
    ),
    "finetune-news": Tuned(
        "finetune/sequence-classification",
        "longer-text-causal_lm",
        "agnews-small",
        ("data.labels=100", "train.epochs=8", "optim.lr=3e-4", "watch.samples=800"),
        "accuracy",
    ),
    "finetune-digits": Tuned(
        "finetune/ctc",
        "longer-spectrogram-tera",
        "fsdd-strings",
        ("train.epochs=36", "optim.lr=1e-3", "model.freeze_features=false", "views.speed=[]", "model.options.frames=400"),
        "cer",
    ),
}
STRINGS = {"train": 1000, "test": 150, "digits": 3, "held": 5}
HELD_OUT = 5  # speaker whose recordings `fsdd-pairs` keeps for the test


def masked() -> dict[str, Result]:
    """Every masked or predictive method where there is a recipe, but for those that are learned longer, above."""
    shipped, above = {*shipped_recipes()}, {result.recipe for result in RESULTS.values()}
    others = [name for name, method in METHODS.items() if method.family != "joint embedding"]
    wanted = {
        f"{kind}-{name}": result._replace(recipe=f"{kind}/{name}-{ending}")
        for kind, (ending, result) in PLACES.items()
        for name in others
    }
    return {name: result for name, result in wanted.items() if result.recipe in shipped and result.recipe not in above}


def longer() -> dict[str, Result]:
    """The best of each modality, about 15 minutes each, all images."""
    short = masked()
    return {
        f"longer-{name}": short[name]._replace(
            words=(*(word for word in short[name].words if not word.startswith("data.limit")), *words), samples=50_000
        )
        for name, words in LONGER.items()
    }


def spoken(data: Path, table: Path) -> None:
    """Recordings of digits beside their words, without one speaker, whose recordings are all in the split `test`."""
    parts = [pyarrow.parquet.read_table(file) for file in sorted(data.glob("*.parquet"))]
    table_of_all = pyarrow.concat_tables(parts).replace_schema_metadata()
    whole, digits = datasets.Dataset(table_of_all), table_of_all.column("label").to_pylist()
    whole = whole.remove_columns("label").add_column("text", [DIGITS[digit] for digit in digits])  # type: ignore[call-arg]
    whole = whole.add_column("label", digits).cast_column("label", datasets.ClassLabel(names=[*DIGITS]))  # type: ignore[call-arg]
    table.mkdir(parents=True, exist_ok=True)
    for name, held in (("test", True), ("train", False)):
        rows = [i for i, speaker in enumerate(whole["speaker"]) if (speaker == HELD_OUT) == held]
        whole.select(rows).to_parquet(table / f"{name}.parquet")


def finished(run: Path) -> bool:
    """Whether the run is there and complete."""
    return (run / "status.json").is_file() and RunFolder.open(run).read_status().get("state") == "finished"


def processor_seconds() -> float:
    """Used so far by this process and the children it has waited for, user and system."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@contextmanager
def counted(run: Path) -> Iterator[None]:
    """Adds what is used meanwhile to cost.json, however it ends."""
    file, start = run / "cost.json", processor_seconds()
    before = json.loads(file.read_text())["cpu_seconds"] if file.is_file() else 0.0
    try:
        yield
    finally:
        gc.collect()  # loaders that wait to be freed have workers that nobody has waited for, which do not count till then
        if run.is_dir():
            file.write_text(json.dumps({"cpu_seconds": round(before + processor_seconds() - start, 1)}) + "\n")


def train(result: Result, data: Path, run: Path) -> None:
    """Train, or go on with what was stopped."""
    if result.pairs:
        table = FOLDER / f"{data.name}-pairs"
        if not (table / "train.parquet").is_file():
            spoken(data, table)
        data = table
    words = ["pretrain", result.recipe, f"data={data}", f"out={run}", "overwrite=true", *result.words]
    if result.vocabulary:
        tokenizer = FOLDER / f"{data.name}-tokenizer"
        if not tokenizer.is_dir():
            call("tokenizer", "train", f"data={data}", f"out={tokenizer}", f"vocab={result.vocabulary}")
        words.append(f"{'modalities.text.' * result.pairs}views.tokenizer={tokenizer}")
    going_on = (run / "checkpoints").is_dir()
    if not going_on:
        (run / "cost.json").unlink(missing_ok=True)
    with counted(run):
        call(*(["resume", str(run)] if going_on else words))
    if not finished(run):
        sys.exit(f"{run}: stopped before its end; the same command goes on.")


def measure(result: Result, data: Path, run: Path) -> None:
    """Train and probe, each unless it is done."""
    file = run / "probe.json"
    if not finished(run):
        file.unlink(missing_ok=True)
        train(result, data, run)
    if not file.is_file():
        if result.pairs:
            scores = {"model": recognised(run)}
        else:
            scores = probe(run / "model", str(data), random=True, samples=result.samples, group=result.group)
        file.write_text(json.dumps(scores, indent=2) + "\n")


def recognised(run: Path) -> dict[str, float]:
    """Accuracies of a run of pairs at its end: by neighbours among the speakers it heard, and by the names of classes alone."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "probe/speech.test/zeroshot" in line)
    return {"knn": last["probe/speech.test/knn"], "zeroshot": last["probe/speech.test/zeroshot"]}


def row(name: str, run: Path) -> Iterator[str]:
    """Lines of the table: accuracies in percent, the cost of training in seconds."""
    cost = run / "cost.json"
    for which, values in json.loads((run / "probe.json").read_text()).items():
        cells = [f"{100 * values[key]:.1f}" if key in values else "" for key in ("knn", "linear", "left_out", "zeroshot")]
        spent = f"{json.loads(cost.read_text())['cpu_seconds']:.0f}" if which == "model" and cost.is_file() else ""
        yield f"| {name} | {which} | " + " | ".join([*cells, spent]) + " |"


def tune(name: str, data: Path) -> dict[str, dict[str, float]]:
    """What a fine-tuned encoder reaches, and fresh weights by the same words; each is trained unless it is done."""
    told, found = TUNED[name], {}
    encoder = (masked() | longer())[told.encoder]
    measure(encoder, data / encoder.data, FOLDER / told.encoder)
    labelled = data / told.data
    if told.data == "fsdd-strings":
        labelled = FOLDER / told.data
        if not (labelled / "test.parquet").is_file():
            write(data / "fsdd", labelled, **STRINGS)
    for which in ("random", "pretrained"):
        run = FOLDER / f"{name}-{which}"
        if not finished(run):
            going_on = "resume=true" if (run / "checkpoints").is_dir() else "overwrite=true"
            words = ("train.threads=1", "data.workers=0", f"model.random={str(which == 'random').lower()}", *told.words)
            with counted(run):
                call("finetune", told.recipe, f"model={FOLDER / told.encoder / 'model'}", f"data={labelled}", f"out={run}",
                     going_on, *words)  # fmt: skip
        cost = json.loads((run / "cost.json").read_text())
        found[which] = json.loads((run / "results.json").read_text()) | cost
    return found


def tuned_row(name: str, found: dict[str, dict[str, float]]) -> str:
    """A line of the table: the score and what it cost, from fresh weights and from the encoder."""
    cells = [f"{100 * found[which][TUNED[name].score]:.1f}" for which in ("random", "pretrained")]
    spent = [f"{found[which]['cpu_seconds']:.0f}" for which in ("random", "pretrained")]
    return f"| {name} | {TUNED[name].score} | " + " | ".join([*cells, *spent]) + " |"


def main() -> None:
    """Train what is missing, measure, print; what fails is named and the others go on."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    folder, results = Path(given.get("data", "../shared/data")), RESULTS | masked() | longer()
    groups = {"methods": COMPARED, "masked": [*masked()], "longer": [*longer()], "finetune": [*TUNED]}
    wanted = [name for word in given.get("only", ",".join([*results, *TUNED])).split(",") for name in groups.get(word, [word])]
    failed = []
    if unknown := [name for name in wanted if name not in results and name not in TUNED]:
        sys.exit(f"only: found {', '.join(unknown)}, expected {', '.join([*groups, *results])}")
    print("| run | | k-NN | linear | left out | zero-shot | CPU seconds |\n|---|---|---|---|---|---|---|")
    for name in [name for name in wanted if name not in TUNED]:
        run = FOLDER / name
        try:
            measure(results[name], folder / results[name].data, run)
        except SystemExit as stop:
            if not isinstance(stop.code, int):
                raise
            failed.append(f"{name} (exit code {stop.code})")
            continue
        print(*row(name, run), sep="\n", flush=True)
    if tuned := [name for name in wanted if name in TUNED]:
        print("\n| run | score | random | pretrained | CPU seconds | CPU seconds |\n|---|---|---|---|---|---|", flush=True)
    for name in tuned:
        try:
            print(tuned_row(name, tune(name, folder)), flush=True)
        except SystemExit as stop:
            if not isinstance(stop.code, int):
                raise
            failed.append(f"{name} (exit code {stop.code})")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
