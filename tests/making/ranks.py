"""Several processes of one run, and what they do together: the same function is called in each, and
in one process alone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from making import networks as tiny, phantoms
from making.configs import SMALL, make_config as rendered_config
from medseg.config import Config, load_config, make_config, override
from medseg.dataset import read_dataset
from medseg.inference.backends import pytorch
from medseg.models import save_checkpoint
from medseg.networks import build_network
from medseg.training.processes import Processes, whole
from medseg.training.rendered import RenderedSource
from medseg.training.scans import ScanSource
from medseg.training.scoring import predict, rehearse, score_validation
from medseg.training.source import model_spec

#: Validation cases of each data set that is looked at.
KINDS = {"usual": 3, "regions": 2, "partly": 3, "one": 1, "none": 0}
TORCHRUN = (
    "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
    sys.executable,
)  # fmt: skip


def call(function: str, folder: Path, *arguments: str) -> tuple[str, ...]:
    """The words after python that call a function of this module."""
    words = ", ".join(map(repr, arguments))
    return "-c", f"from making import ranks; ranks.{function}({str(folder)!r}, {words})"


def run_ranks(
    size: int, *command: object, places: Sequence[Path] = (), timeout: float = 600
) -> list[tiny.Ran]:
    """Run Python with a command in so many processes of one run, each in its place, to their
    ends.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    processes = [
        tiny.start(
            *command,
            env=tiny.environment()
            | {key: str(value) for key, value in own.items()}
            | {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=places[rank] if places else None,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [tiny.Ran(p.returncode, out, err) for p, (out, err) in zip(processes, said)]


def children_of(process: subprocess.Popen[str]) -> dict[str, int]:
    """The processes that torchrun has started: rank -> number."""
    import psutil

    children = psutil.Process(process.pid).children()
    return {one.environ()["RANK"]: one.pid for one in children if "RANK" in one.environ()}


# What each does -----------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """The data sets of `KINDS`: usual, with regions, partly annotated."""
    phantoms.dataset(folder / "usual", 4)
    _nnunet(folder / "regions")
    lines = ["case,image,label,labelled"]
    for number in range(4):
        image, labels = phantoms.phantom(number)
        value = 1 + number % 2
        kept = np.where(labels == value, labels, 0)
        (folder / "partly").mkdir(exist_ok=True)
        tiny.save_nifti(folder / "partly" / f"i{number}.nii.gz", image, np.eye(4))
        tiny.save_nifti(folder / "partly" / f"l{number}.nii.gz", kept, np.eye(4))
        lines.append(f"c{number},i{number}.nii.gz,l{number}.nii.gz,{value}")
    (folder / "partly" / "list.csv").write_text("\n".join(lines) + "\n")
    rendered_config(folder / "rendered")


def _nnunet(folder: Path) -> None:
    """Two structures and what is around both, and voxels to be ignored."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(3):
        image, labels = phantoms.phantom(number)
        labels[:2] = 3
        tiny.save_nifti(folder / "imagesTr" / f"c{number}_0000.nii.gz", image, np.eye(4))
        tiny.save_nifti(folder / "labelsTr" / f"c{number}.nii.gz", labels, np.eye(4))
    names = {"background": 0, "all": [1, 2], "spot": 2, "ignore": 3}
    content = {
        "channel_names": {"0": "T1"}, "labels": names, "regions_class_order": [1, 2],
        "numTraining": 3, "file_ending": ".nii.gz",
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content))


def source_of(folder: Path, kind: str, store: Path, processes: Processes) -> ScanSource:
    """A data set of which the first case trains and as many validate as `KINDS` says."""
    name = {"partly": "partly/list.csv", "regions": "regions"}.get(kind, "usual")
    dataset = read_dataset(folder / name)
    names = [case.name for case in dataset.cases]
    content = {"name": "x", "data": "x", "model": {"name": "unet", "spacing_mm": 1.0}}
    content["model"] |= {"grid": "scan", "intensity": [{"scheme": "zscore"}]}  # type: ignore[operator]
    if kind == "partly":  # else those are tried that make the scores better
        content["cleanup"] = [{"step": "keep_largest", "labels": [1]}]
    config = make_config(override(content, SMALL), "test")
    return ScanSource(
        config,
        dataset,
        training=names[:1],
        validation=names[1 : 1 + KINDS[kind]],
        store=store,
        room_bytes=processes.room_bytes,
    )


def network_of(source: ScanSource, config: Config) -> torch.nn.Module:
    """A network whose weights are random, and always the same."""
    torch.manual_seed(3)
    options = config.model.options
    return build_network(config.model.name, source.channels, source.outputs, **options).eval()


def look(folder: str, own: str) -> dict[str, Any]:
    """All that is shared, done with data sets of every kind; runs lie in the folder `own`, and
    what came of them is returned, and written there by each process.
    """
    out: dict[str, Any] = {}
    # 'auto' is what each process has tried to be faster, which is not looked at here.
    with mock.patch.object(pytorch, "_SETTLED", [torch.float32]), Processes("cpu") as processes:
        for kind in KINDS:
            out[kind] = _look(Path(folder), kind, Path(own), processes)
        rendered = RenderedSource(load_config(Path(folder) / "rendered" / "config.yaml"))
        torch.manual_seed(3)
        network = build_network("unet", 1, rendered.outputs, **tiny.UNET_OPTIONS).eval()
        with torch.no_grad():
            out["rendered"] = rendered.validate(
                network, seeds=[1, 2, 3], device=processes.device, dtype=torch.float32,
                deal=processes.deal,
            )  # fmt: skip
        own_numbers = torch.full((3, 2), float(processes.rank)).t()
        count = torch.tensor(7 + processes.rank)
        processes.same([own_numbers, count])
        out["same"] = [own_numbers.tolist(), int(count)]
        out["gathered"] = len(processes.gather([float("nan"), "é"]))
    (Path(own) / f"rank{processes.rank}.json").write_text(json.dumps(out), encoding="utf-8")
    return out


def _look(folder: Path, kind: str, own: Path, processes: Processes) -> dict[str, Any]:
    run = own / kind
    store = own / f"store{processes.rank}" / kind
    processes.check_folder(run)
    source = source_of(folder, kind, store, processes)
    config = source.config
    if kind == "usual":
        rehearse(config, source, processes)
    network = network_of(source, config)
    validate = {"seeds": [0] * 9, "device": processes.device, "dtype": torch.float32}
    with torch.no_grad():
        curve = source.validate(network, deal=processes.deal, **validate)
        if kind == "usual":
            shared, _ = processes.spread(network_of(source, config), "fsdp")
            weights = {key: whole(value) for key, value in shared.state_dict().items()}
            with processes.whole_network(shared, weights) as one:
                assert source.validate(one.eval(), deal=processes.deal, **validate) == curve
    if processes.first:
        save_checkpoint(
            run / "model", model_spec(config, source), state=network.state_dict(),
            table=source.table,
        )  # fmt: skip
    processes.wait()
    told: list[int] = []
    cleanup, evaluation = [], None
    if source.validation:
        cleanup = predict(
            config, source, run, processes=processes, progress=lambda done, count: told.append(done)
        )
        evaluation = score_validation(source, run, processes)
    scores = None if evaluation is None else [evaluation.rows, evaluation.summary]
    return {"curve": curve, "cleanup": cleanup, "scores": scores, "told": told[-1:]}


def fail(folder: str, own: str) -> None:
    """Segment the validation scans as the command line does, an error told as it tells it."""
    from medseg.cli.show import explain

    try:
        with Processes("cpu") as processes:
            source = source_of(Path(folder), "usual", Path(own) / str(processes.rank), processes)
            predict(
                source.config, source, Path(own) / "usual", processes=processes,
                progress=lambda done, count: None,
            )  # fmt: skip
    except Exception as error:
        text, code = explain(error)
        print(text, file=sys.stderr)
        os._exit(code)
