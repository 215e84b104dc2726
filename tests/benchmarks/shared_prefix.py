"""Replay and training that pay for a prompt once, against the plain way in transformers and against TRL: `make bench`.

    .venv/bin/python tests/benchmarks/shared_prefix.py [--quick]

CPU seconds on one thread, every measurement in a process of its own; tables and plot go to docs/SHARED_PREFIX.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot as plt
import torch
import transformers
from safetensors.torch import load_file
from shared_prefix_clock import REPEATS
from shared_prefix_inputs import GRIDS, save_model, save_prompt
from shared_prefix_steps import G, R
from torch import Tensor

BENCHMARKS = Path(__file__).parent
PROJECT = BENCHMARKS.parents[1]
TRL_PYTHON = PROJECT / ".venv-trl" / "bin" / "python"
PAGE = PROJECT / "docs" / "SHARED_PREFIX.md"
PLOT = PROJECT / "docs" / "images" / "shared_prefix.svg"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
FAMILIES = {"qwen3_vl": "Qwen3-VL", "qwen3_5": "Qwen3.5"}
PAIRS = {
    "replay, one view": ("replay-none", "replay_plain-none"),
    "replay, both views": ("replay-views", "replay_plain-views"),
    "training": (f"train-{G}", f"train_plain-{G}"),
}
IDEALS = {"replay, both views": "ideal, both views", "training": "ideal, the others"}
CUT_FAMILY, CUT_LENGTHS = "qwen3_vl", (1024, 4096)
CUTS = (f"train_plain-{G}", "train_plain-1", "train-1", "train-2", "train-4", f"train-{G}")
"""How a group is cut in several rows, and where that is compared."""
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**33)}
"""Else glibc gives large tensors back at once, and to get them anew was a third of plain replay on Qwen3.5."""
MAX_LOGPROB_DIFFERENCE, MAX_GRADIENT_DIFFERENCE = 1e-5, 1e-5
"""Nats; and of the gradient's norm."""


@dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        seconds: CPU seconds of a step, "all", and of its parts.
        repeats: how many steps they are the median of.
        peak_mib: memory that the steps took beyond what was there before.
        results: what the first step gave.
    """

    seconds: dict[str, float]
    repeats: int
    peak_mib: float
    results: dict[str, Tensor]

    def shown(self, part: str = "all") -> str:
        """Give the seconds as text, with the number of steps where it is not the usual one."""
        return f"{self.seconds[part]:.2f}" + (f" ({self.repeats})" if self.repeats != REPEATS else "")


Prompts = dict[tuple[str, int], dict[str, Measured]]
"""By family and prompt length, by the step's name."""


def measure(models: Path, length: int, name: str, repeats: int, *, keep_memory: bool = True) -> Measured:
    """Measure a step on one prompt, after a first one."""
    prompt, results = models / str(length), models / "results.safetensors"
    if name == "trl":
        command = [TRL_PYTHON, BENCHMARKS / "shared_prefix_trl.py", models, prompt, G, R, repeats]
    else:
        command = [sys.executable, BENCHMARKS / "shared_prefix_steps.py", models, prompt, name, repeats, results]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(KEEP_MEMORY if keep_memory else {})}
    process = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{models.name}, {length} tokens, {name} failed:\n{process.stderr}")
    values = json.loads(process.stdout.splitlines()[-1])
    if name == "trl":
        lengths = values.pop("lengths")
        assert {*lengths} == {length, R}, f"TRL must see {length} tokens and make {R}, got {lengths}"
    found = Measured(**values, results={} if name == "trl" else load_file(results))
    print(f"{models.name}, {length} tokens, {name}: {found.shown()} s, {found.peak_mib:.0f} MiB", flush=True)
    return found


def differences(found: dict[str, Measured]) -> tuple[float, float]:
    """Give how far ours and plain are apart in log-probs, nats, and in gradients, of the gradient's norm."""
    logprobs, gradients = [], []
    for ours_name, plain_name in PAIRS.values():
        ours, plain = found[ours_name].results, found[plain_name].results
        if "logprobs" in plain:
            logprobs.append((ours["logprobs"] - plain["logprobs"]).abs().max().item())
        else:
            assert ours.keys() == plain.keys(), "the same parameters have a gradient"
            apart, norm = (
                torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
                for tensors in ([ours[name] - plain[name] for name in plain], plain.values())
            )
            gradients.append(apart / norm)
    return max(logprobs), max(gradients)


def pair_rows(prompts: Prompts) -> list[list[str]]:
    """Compare ours with the plain way."""
    rows = []
    for (family, length), found in prompts.items():
        for label, (ours_name, plain_name) in PAIRS.items():
            ours, plain, ideal = found[ours_name], found[plain_name], ideal_of(found, ours_name)
            ratio, without = speed_ups(ours, plain)
            rows.append(
                [
                    f"{FAMILIES[family]}, {label}",
                    f"{length:,}",
                    plain.shown(),
                    ours.shown(),
                    f"{ratio:.2f}",
                    f"{ideal:.2f}",
                    f"**{ratio / ideal:.2f}**",
                    f"{without / ideal:.2f}",
                ]
            )
    return rows


def ideal_of(found: dict[str, Measured], name: str) -> float:
    """Give the plain way's tokens over ours."""
    return float(found[name if name.startswith("replay") else "replay-none"].results["ideal"])


def speed_ups(ours: Measured, plain: Measured) -> tuple[float, float]:
    """Give how many times faster ours is, as it is and with the vision tower's seconds left out on both sides."""
    whole, language = (
        [one.seconds["all"] - without * one.seconds["vision"] for one in (plain, ours)] for without in (0, 1)
    )
    return whole[0] / whole[1], language[0] / language[1]


def trl_rows(prompts: Prompts) -> list[list[str]]:
    """Compare a whole step with TRL's."""
    rows = []
    for (family, length), found in prompts.items():
        ours, trl, ideal = found["whole-none"], found["trl"], ideal_of(found, "replay-none")
        ratio = trl.seconds["all"] / ours.seconds["all"]
        for label, one in {"TRL": trl, "ours": ours}.items():
            generation, teacher = one.seconds["generation"], one.seconds["teacher"]
            rows.append(
                [
                    f"{FAMILIES[family]}, {label}",
                    f"{length:,}",
                    one.shown(),
                    f"{generation:.2f}",
                    f"{teacher:.2f}",
                    f"{one.seconds['all'] - generation - teacher:.2f}",
                    *([f"{ratio:.2f}", f"{ideal:.2f}", f"**{ratio / ideal:.2f}**"] if one is ours else [""] * 3),
                ]
            )
    return rows


def sub_group_rows(prompts: Prompts, peaks: dict[tuple[int, str], float]) -> list[list[str]]:
    """Compare how a group is cut for training."""
    rows = []
    for (length, name), peak in peaks.items():
        kind, size = name.split("-")
        label, num_prompts = ("packed", G // int(size)) if kind == "train" else ("plain", G)
        tokens = num_prompts * length + G * R
        seconds = prompts[CUT_FAMILY, length][name].shown()
        rows.append([f"{label}, {size}", f"{length:,}", f"{tokens:,}", seconds, f"{peak:,.0f}"])
    return rows


def agreement_rows(prompts: Prompts) -> list[list[str]]:
    """Give how far ours and plain are apart."""
    return [
        [FAMILIES[family], f"{length:,}", *(f"{value:.1e}" for value in differences(found))]
        for (family, length), found in prompts.items()
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Give a Markdown table, all columns but the first aligned on the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(prompts: Prompts, peaks: dict[tuple[int, str], float]) -> str:
    """Give all tables."""
    ratios = ("speed-up", "ideal", "of ideal")
    parts = ("generation", "teacher", "student")
    return "\n\n".join(
        [
            "### Replay and training against the plain way",
            table(("", "P", "plain, s", "ours, s", *ratios, "without vision"), pair_rows(prompts)),
            "### A whole step against TRL",
            table(("", "P", "step, s", *parts, *ratios), trl_rows(prompts)),
            "### Sub-groups: training, Qwen3-VL",
            table(("responses at a time", "P", "tokens", "CPU s", "MiB"), sub_group_rows(prompts, peaks)),
            "### Largest differences between ours and plain",
            table(("", "P", "log-probs, nats", "gradient, of its norm"), agreement_rows(prompts)),
            f"torch {torch.__version__}, transformers {transformers.__version__}, one thread; the median "
            f"of {REPEATS} steps, or of as many as stand in brackets.",
        ]
    )


def draw(prompts: Prompts) -> None:
    """Draw speed-ups over the prompt's length, ideal ones dashed."""
    # Equal figures give an equal file.
    plt.rcParams.update({"svg.hashsalt": "shared_prefix", "svg.fonttype": "none"})
    figure, panels = plt.subplots(1, len(FAMILIES), figsize=(8, 3.2), sharey=True, layout="constrained")
    for (family, name), panel in zip(FAMILIES.items(), panels, strict=True):
        lengths = [length for other, length in prompts if other == family]
        for color, (label, (ours, plain)) in enumerate(PAIRS.items()):
            found = [prompts[family, length] for length in lengths]
            ratios = [speed_ups(one[ours], one[plain])[0] for one in found]
            panel.plot(lengths, ratios, f"C{color}o-", label=label)
            if label in IDEALS:
                panel.plot(lengths, [ideal_of(one, ours) for one in found], f"C{color}--", label=IDEALS[label])
        panel.set(title=name, xlabel="prompt tokens", xscale="log", xticks=lengths, xticklabels=lengths, ylim=(0, None))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"times the plain way, G = {G}, R = {R}")
    panels[0].legend(fontsize="small")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    """Measure, print, and write the page unless it was a quick look."""
    parser = argparse.ArgumentParser(description="Prompts paid once, against the plain way and against TRL.")
    parser.add_argument("--quick", action="store_true", help="the shortest prompt, one step each, no file written")
    quick: bool = parser.parse_args().quick
    lengths, repeats = (list(GRIDS)[:1], 1) if quick else (list(GRIDS), REPEATS)
    prompts: Prompts = {}
    peaks: dict[tuple[int, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            models = Path(folder) / family
            for seed, role in enumerate(("student", "teacher")):
                save_model(family, models / role, seed)
            for length in lengths:
                save_prompt(models, models / str(length), length)
                names = [name for pair in PAIRS.values() for name in pair] + ["whole-none", "trl"]
                cuts = CUTS if family == CUT_FAMILY and (quick or length in CUT_LENGTHS) else ()
                found = {name: measure(models, length, name, repeats) for name in dict.fromkeys((*names, *cuts))}
                prompts[family, length] = found
                # Memory that is kept is not needed, so this is measured apart, in one step.
                for name in cuts:
                    peaks[length, name] = measure(models, length, name, 0, keep_memory=False).peak_mib
    text = report(prompts, peaks)
    print(text)
    for (family, length), found in prompts.items():
        logprobs, gradient = differences(found)
        if family == "qwen3_vl" and (logprobs > MAX_LOGPROB_DIFFERENCE or gradient > MAX_GRADIENT_DIFFERENCE):
            raise SystemExit(f"ours must give the plain numbers, but at {length} tokens it differs: see the table")
    if not quick:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
        draw(prompts)


if __name__ == "__main__":
    main()
