"""The small trainings of the option census: made once for each set of settings, compared by what they leave."""

from __future__ import annotations

import hashlib
import json
import queue
import shutil
import subprocess
import threading
import tomllib
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from kohaku_wrap.config.schema import PATH_OPTIONS
from kohaku_wrap.dataset.captions.formats import CACHE_FILE
from kohaku_wrap.errors import KwrapError, ProblemsFound
from kohaku_wrap.files import shipped_folder, write_text
from kohaku_wrap.formats.network_names import KOHYA_LORA
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.locks import holding_lock
from kohaku_wrap.processes import python_command, safe_environment
from kohaku_wrap.proving.killing import ON_THE_CPU
from kohaku_wrap.proving.likeness import read_positions, read_tensors
from kohaku_wrap.proving.prove import BATCH_PER_PROCESS, Bench, write_site_of
from kohaku_wrap.trainer.options import flatten_sections
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.starting.create import create_run, plan_new_run
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume

BASE_TEMPLATE = shipped_folder("proofs") / "census.toml"
NETWORK = "NETWORK"
"""In a row's value: the network of the run without any settings."""

MAP_TARGETS = ("Transformer2DModel", "ResnetBlock2D")
"""The classes whose maps a row of `map.NAME` fills: linear layers and convolutions."""

LEDGER_FIELDS = ("optimizer_step", "epoch", "position", "order_digest", "content_digest", "loss", "learning_rate")

Settings = Mapping[str, Any]
"""Values by key of a template."""

Signature = tuple[str, str]
"""Digests of the final network and of the ledger."""


class CaseFailed(KwrapError):
    """A training of the census did not reach its end."""


class ForkServer:
    """The process that imported the trainer."""

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                python_command("-m", "kohaku_wrap.training.engines.fork_attempts"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                errors="replace",
                env=safe_environment(ON_THE_CPU),
            )
        self.log = log

    def run(self, **asked: Any) -> int:
        """One attempt to its end; its exit code. Raises CaseFailed where the server is gone."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise KwrapError("the trainer could not be imported", f"See {self.log}.")
        return int(json.loads(answer)["exit_code"])

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class CensusBench:
    """World, site and runs of one census."""

    def __init__(self, folder: Path, servers: int, *, keep: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.world = folder / "world"
        self.runs = folder / "runs"
        self.lock = threading.Lock()
        self.done: dict[str, Future[Signature]] = {}
        self.servers: queue.Queue[ForkServer] = queue.Queue()
        self.count = servers

    def __enter__(self) -> CensusBench:
        for name in ("runs", "refused", "logs", "sites", "images"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        Bench(self.folder, "sd-scripts").make_world()
        for number in range(self.count):
            self.servers.put(ForkServer(self.folder / "logs" / f"server-{number}.log"))
        return self

    def __exit__(self, *_exception: object) -> None:
        while not self.servers.empty():
            self.servers.get().close()

    def write_site(self, name: str, own_images: bool) -> Path:
        """The world's site; with a copy of the images where a run writes beside them."""
        images = self.world / "images"
        if own_images:
            copied, images = images, self.folder / "images" / name
            copy_images(copied.resolve(), images)
        machine = {"engine": "sd-scripts", "processes": 1, "batch_per_gpu": BATCH_PER_PROCESS, "workers": None}
        path = self.folder / "sites" / f"{name}.toml"
        return write_site_of(self.world, path, {"images": images, "runs": self.runs}, machine)

    def signature(self, settings: Settings) -> Signature:
        """What a training with these settings leaves; trained once. Raises CaseFailed."""
        key = json.dumps(settings, sort_keys=True)
        with self.lock:
            future = self.done.get(key)
            is_first = future is None
            if future is None:
                future = self.done[key] = Future()
        if is_first:
            try:
                future.set_result(self.train(f"c{hashlib.sha256(key.encode()).hexdigest()[:10]}", settings))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def train(self, name: str, settings: Settings) -> Signature:
        """Train and read the result."""
        if "NETWORK" in json.dumps(settings):
            self.signature({"save_model_as": "safetensors"})
            network = str(self.folder / "network.safetensors")
            settings = json.loads(json.dumps(settings).replace(NETWORK, network))
        paths = {key: value for key, value in settings.items() if key in PATH_OPTIONS}
        template = write_template(
            self.folder / "templates" / f"{name}.toml",
            {key: value for key, value in settings.items() if key not in paths},
        )
        site = self.write_site(name, own_images=settings.get("kwrap.data") == "sd-scripts")
        if log_file := paths.get("console_log_file"):
            paths["console_log_file"] = str(self.folder / log_file)
        overrides = [f"{key}={json.dumps(value)}" for key, value in paths.items()]
        try:
            run = create_run(plan_new_run(str(template), site, name, None, overrides), ["census"])
            attempt, launch = begin_attempt(plan_resume(run))
        except ProblemsFound as found:
            raise CaseFailed(f"refused: {'; '.join(f'{each.where}: {each.what}' for each in found.problems)}") from None
        except KwrapError as error:
            raise CaseFailed(f"refused: {error.message}") from None
        log = self.folder / "logs" / f"{name}.log"
        server = self.servers.get()
        try:
            with holding_lock(attempt.supervisor_lock, CaseFailed(f"another process supervises {run.folder}")):
                code = server.run(
                    folder=str(launch.folder),
                    environment=dict(launch.environment),
                    arguments=list(launch.argv[launch.argv.index("-m", 3) + 2 :]),
                    log=str(log),
                )
        finally:
            self.servers.put(server)
        if code:
            said = "; ".join(f"{each.kind}: {each.message}" for each in attempt.failures()) or f"exit code {code}"
            raise CaseFailed(f"the training failed: {' '.join(said.split())[:300]} (log {log})")
        result = read_signature(run)
        if settings == {"save_model_as": "safetensors"}:
            shutil.copy(run.networks[0], self.folder / "network.safetensors")
        if not self.keep:
            shutil.rmtree(run.folder)
            shutil.rmtree(self.folder / "images" / name, ignore_errors=True)
        return result


def copy_images(source: Path, target: Path) -> None:
    """The images with their captions; the trainer's own cache names them by absolute paths."""
    shutil.copytree(source, target)
    cache = target / CACHE_FILE
    if cache.is_file():
        cache.write_text(cache.read_text(encoding="utf-8").replace(str(source), str(target)), encoding="utf-8")


def write_template(path: Path, settings: Settings) -> Path:
    """The base template of the census with these settings over it."""
    document = tomllib.loads(BASE_TEMPLATE.read_text(encoding="utf-8"))
    title = document.pop("title")
    named = ("kwrap", "network_args", "dataset_options", "preset")
    tables: dict[str, dict[str, Any]] = {name: document.pop(name) for name in named if name in document}
    flat = flatten_sections(document)
    for key, value in settings.items():
        table, _, name = key.rpartition(".")
        if table == "map":
            maps = tables["preset"].setdefault("module_algo_map", {})
            for target in MAP_TARGETS:
                maps.setdefault(target, {})[name] = value
        elif table:
            tables.setdefault(table, {})[name] = value
        elif key in tables.get("dataset_options", {}):
            tables["dataset_options"][key] = value
        else:
            flat[key] = value
    # What would contradict a setting, or be ignored beside it, is left out.
    if "max_train_epochs" in flat:
        del flat["max_train_steps"]
    if flat["network_module"] == KOHYA_LORA:
        tables["network_args"].pop("algo")
    write_text(path, toml_text({"title": title, "training": flat, **tables}))
    return path


def read_signature(run: Run) -> Signature:
    """Digests of the final network, in whichever format, tensor by tensor, and of the records."""
    network = hashlib.sha256()
    for name, (dtype, shape, data) in sorted(read_tensors(run.networks[0]).items()):
        network.update(f"{name} {dtype} {shape}\n".encode() + data)
    records, _ = read_positions(run)
    ledger = hashlib.sha256(b"".join(records[field].tobytes() for field in LEDGER_FIELDS))
    return network.hexdigest(), ledger.hexdigest()
