"""`kwrap merge`: a formula over checkpoints and networks becomes one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from kohaku_wrap.cli.merge_grid import grid_options, run_grid
from kohaku_wrap.cli.options import PATH, note_compiling, threads_option
from kohaku_wrap.cli.output import (
    print_answer,
    print_aside,
    print_note,
    progress_bar,
    verb,
)
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.files import describe_absence, expand_user
from kohaku_wrap.merging.file_metadata import build_metadata, describe_sums, join_licenses
from kohaku_wrap.merging.plan import MergeOptions, MergePlan, estimate_formats, read_bytes_of
from kohaku_wrap.merging.recipes import DTYPES, WORDS_OF_OPTION, find_recipe, type_options
from kohaku_wrap.wording import count_of, format_share, show_bytes, show_path

Function = TypeVar("Function", bound=Callable[..., Any])

VERIFY_ELEMENTS = 10_000
WORST_SHOWN = 5
MUCH_LOST = 0.5
"""Relative error of a network above which it is warned of."""


def choice(flag: str, text: str) -> Callable[[Function], Function]:
    """An option with a few words to choose from; without a default, so that a recipe may say it."""
    name = "network" if flag == "--as" else flag.lstrip("-").replace("-", "_")
    words = WORDS_OF_OPTION[name]
    usual = "" if flag in ("--dtype", "--prediction", "--as") else f" Usually {words[0]}."
    return click.option(flag, name, type=click.Choice(words), help=text + usual)


def read_bindings(pairs: tuple[str, ...]) -> dict[str, Path]:
    """Names and paths from `-m NAME=PATH`."""
    bindings: dict[str, Path] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name or not text:
            raise UsageError(f"-m {pair}: expected NAME=PATH", "For example: -m base=model.safetensors")
        if name in bindings:
            raise UsageError(f"-m {name} is given twice", "Give each name one file.")
        path = expand_user(text)  # which shells leave as it is behind a =
        if not path.is_file():
            raise UsageError(f"-m {name}: {path}: {describe_absence(path)}", "Check the path.")
        bindings[name] = path
    return bindings


def choose_options(given: dict[str, Any]) -> MergeOptions:
    """The options of a recipe and of the command line. Raises UsageError where one means nothing."""
    options = replace(MergeOptions(), **given)
    for name, kinds in {"rank": ("lora",), "energy": ("lora",), "factor": ("lokr",), "rest": ("lora", "lokr")}.items():
        if getattr(options, name) not in (0, "keep") and options.network not in kinds:
            raise UsageError(f"--{name} means nothing without --as {' or '.join(kinds)}", "Leave it out, or add that.")
    if options.network and options.dtype in ("fp64", "fp8_e4m3fn", "fp8_e5m2"):
        raise UsageError(f"--dtype {options.dtype} is no type for networks", "Types: fp16, bf16, fp32.")
    return replace(options, dtype=DTYPES.get(options.dtype, options.dtype))


def describe_plan(plan: MergePlan) -> dict[str, Any]:
    """What `--dry-run --json` shows."""
    from kohaku_wrap.merging.formula.tree import format_formula

    rights = join_licenses(plan.headers)
    return {
        "formula": format_formula(plan.formula.tree),
        "anchor": plan.anchor,
        "network": plan.options.network,
        "coefficients": describe_sums(plan),
        "models": {name: str(header.path) for name, header in plan.files.items()},
        "networks": {name: str(header.path) for name, header in plan.networks.items()},
        "tensors": len(plan.tensors),
        "dtypes": {name: {"tensors": count, "bytes": size} for name, (count, size) in estimate_formats(plan).items()},
        "data_bytes": plan.data_bytes,
        "read_bytes": read_bytes_of(plan),
        "layout": [
            {"key": t.key, "dtype": t.spot.dtype, "shape": list(t.spot.shape), "begin": t.spot.begin, "end": t.spot.end}
            for t in plan.tensors
        ],
        "license": rights.text,
        "decisions": [*plan.decisions, *([rights.conflict] if rights.conflict else [])],
    }


def print_plan(described: dict[str, Any], next_step: str) -> None:

    kind = described["network"]
    rows: list[tuple[str, Any]] = [("formula", described["formula"]), ("anchor", described["anchor"])][
        : 1 if kind else 2
    ]
    rows += [(name, path) for name, path in {**described["models"], **described["networks"]}.items()]
    rows += [("computes" if place == 0 else "", f"{item['sum']}  ({count_of(item['tensors'], 'tensor')})")
             for place, item in enumerate(described["coefficients"])]  # fmt: skip
    rows += [
        (name, f"{count_of(entry['tensors'], 'tensor')}, {show_bytes(entry['bytes'])}")
        for name, entry in described["dtypes"].items()
    ]
    rows += [
        ("reads", show_bytes(described["read_bytes"])),
        ("writes", f"a network: {kind}" if kind else f"{show_bytes(described['data_bytes'])} and a header"),
    ]
    rows += [("license", described["license"] or "none")]
    rows += [("note", line) for line in described["decisions"]]
    print_answer({"dry_run": True, **described}, "Merge plan", rows, next_step)


@verb(
    """
  kwrap merge "base + 1.0 * net(epsilon)" \\
      -m base=base.safetensors -m epsilon=epsilon.safetensors -o out.safetensors
  kwrap merge gamma-rev1 -m beta7=a.safetensors -m anxl3=b.safetensors \\
      -m anxl2=c.safetensors -m base7=d.safetensors -o e.safetensors --dry-run
  kwrap merge "a + blocks(IN00..IN08=0.5, MID=0.3, else=0) * (b - a)" \\
      -m a=a.safetensors -m b=b.safetensors -o c.safetensors
  kwrap merge 'a + only("*attn2*", 0.3 * (b - a))' \\
      -m a=a.safetensors -m b=b.safetensors -o c.safetensors
  kwrap merge "tuned - base" --as lora --rank 32 \\
      -m tuned=a.safetensors -m base=b.safetensors -o lora.safetensors
  kwrap merge "net(a) + 0.5 * net(b)" --as lora \\
      -m a=a.safetensors -m b=b.safetensors -o lora.safetensors
  kwrap merge --grid "a + A*(b - a)" A=0.5:1.25:0.25 --sheet sheet.toml \\
      --evaluate "judge --judge DIR" -m a=a.safetensors -m b=b.safetensors -o tried

\b
Formulas: names, decimal numbers (0.8 is exactly 4/5), + - * /, brackets;
  net(x)                      what a network adds (LoKr, LoHa, LoCon, LoRA,
                              full, norms, DoRA)
  blocks(IN04=0.5, …, else=1) a number for each block: IN00-IN11, MID,
                              OUT00-OUT11, BASE (all others), TE, TE1, TE2,
                              VAE; 1 where not named
  blocks(1,0,…), blocks("MIDD")
                              12, 19 or 20 numbers in a row (17, 25 or 26
                              with --layout sd15), or a preset
  unet(x), te(x), te1(x), te2(x), vae(x)
                              x for the keys of that part; elsewhere a
                              difference with it counts as 0
  only("pattern", x, else=y)  x for the keys that match, y (or nothing) for
                              the others
  train_difference(a, b, c), cosine(a, b), slerp(a, b, t),
  dare(x - a, drop, seed), ties(x - a, y - a, k)
                              functions that are no sums, in float64: see
                              docs/merging.md
A formula that begins with - goes last, after --.
""",
    unless=("dry_run",),
)
@click.argument("formula_or_recipe")
@click.argument("letters", nargs=-1, metavar="[A=NUMBERS]...")
@click.option("-m", "--model", "models", multiple=True, metavar="NAME=PATH", help="A file for a name of the formula.")
@click.option("-o", "--output", type=PATH, help="The file to write.")
@click.option("--dry-run", is_flag=True, help="Read the headers only and print what would be computed.")
@click.option("--verify", is_flag=True, help=f"Compute {VERIFY_ELEMENTS:,} random numbers again in rationals.")
@threads_option
@click.option("--like", default="", metavar="NAME|PATH", help="The anchor: keys, types and VAE; else the first model.")
@click.option("--vae-from", default="", metavar="NAME|PATH", help="The model whose VAE is taken; else the anchor.")
@click.option("--merge-vae", is_flag=True, help="Apply the formula to the VAE too, which often blends badly.")
@click.option("--parts", default="", metavar="PART,…", help="Merge these parts alone: unet, te, te1, te2, vae.")
@choice("--layout", "What a list of numbers in blocks(…) is of.")
@choice("--as", "Write a change (`tuned - base`, `net(x)`) as a network of this kind.")
@click.option("--rank", type=click.IntRange(min=1), help="Of LoRA, at most; else 32, or as joined.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of LoRA: the least rank that holds this share of squares.",
)
@click.option("--factor", type=click.IntRange(min=-1), help="Of LoKr, as LyCORIS counts; else the networks' own, or 8.")
@choice("--rest", "Norms and biases, which LoRA and LoKr cannot hold: keep them whole.")
@choice("--dtype", "One type for all floating tensors; else the anchor's types.")
@choice("--prediction", "What the file is marked to predict; else what its models do.")
@choice("--missing", "A model with weight lacks a key: the anchor's tensor, or count as 0.")
@choice("--shapes", "Shapes differ: copy the anchor's tensor.")
@choice("--unmatched", "A network has keys that the checkpoint or kwrap does not know: leave them out.")
@choice("--sums", "The coefficients of a tensor do not sum to 1.")
@choice("--non-finite", "An input is infinite or NaN.")
@choice("--overflow", "A result is too large for its type: keep the infinity.")
@click.option("--title", default="", help="modelspec.title of the file; else the recipe's, or the formula.")
@grid_options
@click.option("--date", default="", help="modelspec.date; without it equal merges are equal files.")
def command(
    formula_or_recipe: str,
    letters: tuple[str, ...],
    models: tuple[str, ...],
    output: Path | None,
    dry_run: bool,
    verify: bool,
    threads: int,
    title: str,
    date: str,
    grid: bool,
    sheet: Path | None,
    sample_words: str,
    evaluations: tuple[str, ...],
    keep: str | None,
    **asked: Any,
) -> None:
    """Merge checkpoints by a formula and bake networks in, exactly.

    FORMULA_OR_RECIPE is a formula, the name of a shipped recipe (gamma-rev1, bake-network) or a TOML file. Every
    number of a sum is what exact arithmetic gives, rounded once. The file carries its recipe.
    """
    from kohaku_wrap.merging.planning import plan_merge

    recipe = find_recipe(formula_or_recipe)
    bindings = read_bindings(models)
    given = recipe.options | {name: value for name, value in asked.items() if value}
    options = choose_options(given)
    of_grid = {"sheet": sheet, "sample_words": sample_words, "evaluations": evaluations, "keep": keep}
    if grid:
        words = [word for name, path in bindings.items() for word in ("-m", f"{name}={path}")]
        words += type_options({**given, "title": title, "date": date, "threads": threads, "verify": verify})
        if options.network:
            raise UsageError("--grid makes checkpoints, not networks", "Leave out --as.")
        plan_of = partial(plan_merge, paths=bindings, options=options)
        run_grid(recipe.formula, letters, bindings, output, plan_of, words, of_grid, dry_run)
        return
    if odd := [*letters, *(name for name, value in of_grid.items() if value)]:
        raise UsageError(f"{odd[0]} means nothing without --grid", "Add --grid, or leave it out.")
    if verify and options.network:
        raise UsageError("--verify means nothing with --as", "Leave it out: the error of a network is always measured.")
    plan = plan_merge(recipe.formula, bindings, options)
    described = describe_plan(plan)
    if dry_run:
        print_plan(
            described, "the same command " + ("without --dry-run" if output else "with -o FILE, without --dry-run")
        )
        return
    if output is None:
        raise UsageError("no output is named", "Add -o FILE.safetensors, or --dry-run to see what would be computed.")

    from kohaku_wrap.merging.hashes import hash_files
    from kohaku_wrap.merging.open_files import check_output

    check_output(output, plan.headers)
    for line in described["decisions"]:
        print_note(line if line.startswith("warning: ") else f"note: {line}")
    with progress_bar("hash the inputs", "bytes") as report:
        hashes = hash_files([header.path for header in plan.headers.values()], threads, report)
    metadata = build_metadata(plan, dict(zip(plan.headers, hashes, strict=True)), title, date, recipe)
    if plan.options.network:
        print_network(plan, output, metadata, threads)
        return
    from kohaku_wrap.merging.running import run_merge

    note_compiling()
    with progress_bar("merge and verify" if verify else "merge", "bytes") as report:
        result = run_merge(plan, output, metadata, threads, VERIFY_ELEMENTS if verify else 0, report)
    kept = {"non_finite": dict(result.faults.inputs), "overflow": dict(result.faults.overflows)}
    payload = {"dry_run": False, **described, "output": str(output), "size_bytes": result.size_bytes}
    payload |= {"verified": result.verified, **kept}
    payload.pop("layout")
    rows: list[tuple[str, Any]] = [
        ("formula", described["formula"]),
        ("file", output),
        ("size", show_bytes(result.size_bytes)),
    ]
    rows += [("tensors", described["tensors"])]
    if verify:
        rows.append(("verified", f"{result.verified:,} random numbers equal rational arithmetic"))
        if result.unverified:
            rows.append(("not verified", f"{result.unverified:,} numbers that DoRA or functions set in floats"))
    rows += [(f"kept {what.replace('_', ' ')}", ", ".join(keys)) for what, keys in kept.items() if keys]
    next_step = next_after([header.path for header in plan.networks.values()], output)
    print_answer(payload, "Merged", rows, next_step)


def print_network(plan: MergePlan, output: Path, metadata: dict[str, str], threads: int) -> None:
    """Write a change as a network, and print how exact it is."""
    from kohaku_wrap.merging.extraction.changes import write_network
    from kohaku_wrap.merging.extraction.layers import describe_fits

    note_compiling()
    with progress_bar("fit", "numbers") as report:
        result = write_network(plan, output, metadata, threads, report)
    described = describe_plan(plan)
    described.pop("layout")
    fits = describe_fits(result.fits)
    payload = {"dry_run": False, **described, "output": str(output), "size_bytes": result.size_bytes}
    payload |= {"error": result.error, "unchanged": result.unchanged, "modules": fits}
    forms = Counter(fit["form"] for fit in fits)
    rows: list[tuple[str, Any]] = [("formula", described["formula"]), ("file", output)]
    rows += [("size", show_bytes(result.size_bytes)), ("unchanged", count_of(result.unchanged, "layer"))]
    rows += [(form, count_of(count, "layer")) for form, count in forms.items()]
    ranks = [fit["rank"] for fit in fits if fit["rank"]]
    rows += [("ranks", f"{min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.1f} on average")] if ranks else []
    rows += [("relative error", f"{result.error:.2e} of the whole change: what the file lacks, rounding included")]
    worst = sorted(fits, key=lambda fit: -fit["error"])[:WORST_SHOWN]
    rows += [("worst" if not place else "", f"{fit['error']:.2e}  {fit['module']} ({fit['kind']})")
             for place, fit in enumerate(worst)]  # fmt: skip
    if result.error > MUCH_LOST:
        lost = format_share(result.error)
        print_aside(f"warning: the file lacks {lost} of the change; a higher --rank, or --energy, keeps more of it")
    print_answer(payload, "Network", rows, command_line("inspect", output))


def next_after(networks: list[Path], output: Path) -> str:
    """`kwrap publish` where the networks are of one run, else a look at what was made."""
    from kohaku_wrap.training.records.folder import is_run

    runs = {path.parent.parent for path in networks if is_run(path.parent.parent)}
    if len(runs) != 1:
        return command_line("inspect", output)
    (run,) = runs
    return command_line("publish", show_path(run), "--out", f"{run.name}-published")
