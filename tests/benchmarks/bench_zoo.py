"""Every architecture on one data set for the same time, against nnU-Net and MONAI's DynUNet recipe
on the same split.

python tests/benchmarks/bench_zoo.py DATASET -o FOLDER [--time 4m] [--threads 1] [--at-once 2]
[--only unet nnunet ...]

A member is one `medseg train DATASET --model NAME --time TIME` in a process of its own with so many
threads; the time is all it may take, scoring included. The peers are given the same time for their
loop alone, their learning rate fitted to it, and are scored afterwards: nnU-Net is `nnUNetTrainer`
with its own plan, and MONAI is the DynUNet of its tutorial for Task04 (patch 40x56x40, SGD 0.01
with Nesterov momentum 0.99 and a polynomial decay, Dice and cross-entropy, flips, zoom, noise,
blur, scaling). Dice is the mean over structures of the means over the validation cases of fold 0;
inference is seconds a case, model loading left out, alone. Results that are in FOLDER already are
taken from there. What is not installed is named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PEERS = ("nnunet", "monai_dynunet")
PATCH, BATCH = (40, 56, 40), 9


def member(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one architecture through the command line; time and score it."""
    run = options.output / name
    arguments = [
        "train",
        options.dataset,
        "-o",
        run,
        "--model",
        name,
        "--time",
        options.time,
        "--quiet",
    ]
    subprocess.run(
        [sys.executable, "-m", "medseg", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return medseg_facts(run, options.dataset)


def medseg_facts(run: Path, dataset: Path) -> dict[str, Any]:
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from making.network_size import parameters_and_flops
    from medseg.config import read_settings
    from medseg.dataset.cases import read_channels
    from medseg.dataset.reading import read_dataset
    from medseg.evaluation.summary import read_scores
    from medseg.inference.segmentation import segment
    from medseg.inference.settings import Settings
    from medseg.models.folder import load_checkpoint
    from medseg.training.state import load_state

    rows = read_scores(run / "scores.csv")
    checkpoint = load_checkpoint(str(run))
    parameters, operations = parameters_and_flops(checkpoint.network(), checkpoint.spec.patch)
    facts = load_state(run / "state.safetensors")[1]
    config = read_settings(run / "config.yaml")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    data = read_dataset(dataset)
    held_out = json.loads((run / "splits.json").read_text())["validation"][:8]
    times = []
    for case in held_out:
        volumes = read_channels(data, data[case])
        begun = time.perf_counter()
        segment(volumes, checkpoint, Settings())
        times.append(time.perf_counter() - begun)
    pace = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = statistics.median(row["seconds_a_step"] for row in pace if "seconds_a_step" in row)
    return {
        "dice": mean_of_structures(rows),
        "parameters": parameters,
        "multiply_adds": operations,
        "patch": list(checkpoint.spec.patch),
        "patches": facts["step"] * config["train"]["batch"],
        "patches_a_second": config["train"]["batch"] / step,
        "inference_s": statistics.median(times),
    }


def mean_of_structures(rows: list[dict[str, Any]]) -> float:
    names = dict.fromkeys(row["structure"] for row in rows)
    return statistics.mean(
        statistics.mean(r["dice"] for r in rows if r["structure"] == name) for name in names
    )


def split_of(dataset: Path) -> tuple[Any, list[str], list[str]]:
    from medseg.dataset.reading import read_dataset
    from medseg.dataset.splits import split_cases

    data = read_dataset(dataset)
    training, validation = split_cases(data)[0]
    return data, training, validation


def dice_of(found: Any, truth: Any, values: list[int]) -> list[float]:
    result = []
    for value in values:
        a, b = found == value, truth == value
        result.append(2 * float((a & b).sum()) / max(1.0, float(a.sum() + b.sum())))
    return result


def train_monai(dataset: Path, seconds: float) -> dict[str, Any]:
    """MONAI's DynUNet as its tutorial trains it for Task04, its schedule fitted to the clock."""
    import numpy as np
    import torch
    from monai.data import CacheDataset, DataLoader
    from monai.inferers import sliding_window_inference
    from monai.losses import DiceCELoss
    from monai.networks.nets import DynUNet
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        RandCropByPosNegLabeld,
        RandFlipd,
        RandGaussianNoised,
        RandGaussianSmoothd,
        RandScaleIntensityd,
        RandZoomd,
        Spacingd,
        SpatialPadd,
    )

    data, training, validation = split_of(dataset)
    both = ["image", "label"]
    load = [
        LoadImaged(both),
        EnsureChannelFirstd(both),
        Spacingd(both, (1.0, 1.0, 1.0), mode=("bilinear", "nearest")),
        NormalizeIntensityd("image", nonzero=True),
    ]
    vary = [
        SpatialPadd(both, PATCH),
        RandCropByPosNegLabeld(
            both, "label", PATCH, pos=2, neg=1, num_samples=1, image_key="image"
        ),
        RandZoomd(both, 0.15, 0.9, 1.2, mode=("trilinear", "nearest"), align_corners=(True, None)),
        RandGaussianNoised("image", 0.15, std=0.01),
        RandGaussianSmoothd("image", (0.5, 1.15), (0.5, 1.15), (0.5, 1.15), prob=0.15),
        RandScaleIntensityd("image", 0.3, 0.15),
        *(RandFlipd(both, 0.5, axis) for axis in range(3)),
    ]
    torch.manual_seed(0)
    files = [
        {"image": str(data[name].images[0]), "label": str(data[name].label)} for name in training
    ]
    loader = DataLoader(
        CacheDataset(files, Compose(load + vary), progress=False), batch_size=BATCH, shuffle=True
    )
    kernels, strides = [[3] * 3] * 4, [[1] * 3] + [[2] * 3] * 3
    network = DynUNet(
        3,
        1,
        3,
        kernels,
        strides,
        strides[1:],
        norm_name="instance",
        deep_supervision=True,
        deep_supr_num=2,
    )
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    optimizer = torch.optim.SGD(
        network.parameters(), 0.01, momentum=0.99, weight_decay=3e-5, nesterov=True
    )
    begun, steps, paces = time.monotonic(), 0, []
    while (share := (time.monotonic() - begun) / seconds) < 1:
        for batch in loader:
            share = min(1.0, (time.monotonic() - begun) / seconds)
            if share >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (1 - share) ** 0.9
            before = time.monotonic()
            outputs = network(batch["image"].as_tensor())
            heads = torch.unbind(outputs, 1)
            labels = batch["label"].as_tensor()
            loss = sum(0.5**n * loss_of(head, labels) for n, head in enumerate(heads))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
            steps += 1
            paces.append(time.monotonic() - before)
    network.eval()
    times, scores = [], []
    with torch.inference_mode():
        for name in validation:
            case = Compose(load)(
                {"image": str(data[name].images[0]), "label": str(data[name].label)}
            )
            before = time.perf_counter()
            logits = sliding_window_inference(
                case["image"][None].as_tensor(), PATCH, 1, network, 0.5, "gaussian"
            )
            found = logits.argmax(1)[0].numpy()
            times.append(time.perf_counter() - before)
            scores.append(dice_of(found, case["label"][0].numpy(), [1, 2]))
    return {
        "dice": float(np.mean(scores)),
        "parameters": sum(p.numel() for p in network.parameters()),
        "patch": list(PATCH),
        "patches": steps * BATCH,
        "patches_a_second": BATCH / statistics.median(paces),
        "inference_s": statistics.median(times),
    }


def train_nnunet(dataset: Path, seconds: float, folder: Path) -> dict[str, Any]:
    """nnU-Net's own trainer and plan; epochs of 5 iterations, as many as fit, so that its schedule
    ends in time.
    """
    raw, name = folder / "raw", "Dataset004_Hippocampus"
    os.environ |= {
        "nnUNet_raw": str(raw),
        "nnUNet_preprocessed": str(folder / "pre"),
        "nnUNet_results": str(folder / "res"),
    }
    os.environ["nnUNet_n_proc_DA"] = "1"  # noqa: SIM112
    data, training, validation = split_of(dataset)
    target = raw / name
    for part in ("imagesTr", "labelsTr"):
        (target / part).mkdir(parents=True, exist_ok=True)
    for case in data.cases:
        for source, to in (
            (case.images[0], f"imagesTr/{case.name}_0000.nii.gz"),
            (case.label, f"labelsTr/{case.name}.nii.gz"),
        ):
            if not (target / to).exists():
                (target / to).symlink_to(Path(source).resolve())
    labels = {"background": 0} | {label.name: label.value for label in data.table.labels}
    content = {
        "channel_names": {"0": "MRI"},
        "labels": labels,
        "numTraining": len(data.cases),
        "file_ending": ".nii.gz",
    }
    (target / "dataset.json").write_text(json.dumps(content))

    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    if not (folder / "pre" / name / "nnUNetPlans_3d_fullres").exists():
        extract_fingerprints([4], num_processes=1)
        plan_experiments([4])
        preprocess([4], configurations=("3d_fullres",), num_processes=(1,))
    (folder / "pre" / name / "splits_final.json").write_text(
        json.dumps([{"train": training, "val": validation}])
    )
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112  # augmentation in the same thread
    trainer = get_trainer_from_args("4", "3d_fullres", 0, device=torch.device("cpu"))
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 5, 1
    trainer.disable_checkpointing = False
    trainer.on_train_start()
    begun, paces, iterations = time.monotonic(), [], 0
    while (spent := time.monotonic() - begun) < seconds:
        if paces:
            epochs = trainer.current_epoch + max(
                1.0, (seconds - spent) / (5 * statistics.median(paces))
            )
            trainer.num_epochs = round(epochs)
            trainer.lr_scheduler = PolyLRScheduler(
                trainer.optimizer, trainer.initial_lr, trainer.num_epochs
            )
        trainer.on_train_epoch_start()
        outputs = []
        for _ in range(5):
            before = time.monotonic()
            outputs.append(trainer.train_step(next(trainer.dataloader_train)))
            paces.append(time.monotonic() - before)
            iterations += 1
            if time.monotonic() - begun > seconds:
                break
        trainer.on_train_epoch_end(outputs)
        trainer.current_epoch += 1
    trainer.set_deep_supervision_enabled(False)
    trainer.inference_allowed_mirroring_axes = None  # as the others: no test-time mirroring
    before = time.perf_counter()
    trainer.perform_actual_validation(save_probabilities=False)
    taken = (time.perf_counter() - before) / len(validation)
    summary = json.loads((Path(trainer.output_folder) / "validation" / "summary.json").read_text())
    batch = trainer.configuration_manager.batch_size
    return {
        "dice": summary["foreground_mean"]["Dice"],
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "patch": list(trainer.configuration_manager.patch_size),
        "patches": iterations * batch,
        "patches_a_second": batch / statistics.median(paces),
        "inference_s": taken,
    }


def child(options: argparse.Namespace) -> None:
    """One member or peer, in its own process: its facts as JSON beside the others."""
    from medseg.cli.options import parse_seconds
    from medseg.machine import keep_memory

    keep_memory()
    seconds = parse_seconds(options.time)
    if options.child == "nnunet":
        facts = train_nnunet(options.dataset, seconds, options.output / "nnunet")
    elif options.child == "monai_dynunet":
        facts = train_monai(options.dataset, seconds)
    else:
        facts = member(options.child, options)
    (options.output / f"{options.child}.json").write_text(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--time", default="4m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--only", nargs="+")
    parser.add_argument(
        "--python-of",
        nargs="*",
        default=[],
        metavar="PEER=PYTHON",
        help="environments of the peers",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.child:
        child(options)
        return
    from medseg.networks.zoo import NETWORKS

    pythons = dict(text.split("=", 1) for text in options.python_of)
    names = options.only or [*NETWORKS, *PEERS]
    needed = {"nnunet": "nnunetv2", "monai_dynunet": "monai"}
    for name in [n for n in names if n in needed and n not in pythons and not find_spec(needed[n])]:
        print(f"{name}: {needed[name]} is not installed, left out")
        names.remove(name)

    def run(name: str) -> None:
        if (options.output / f"{name}.json").exists():
            return
        environment = os.environ | {
            "OMP_NUM_THREADS": str(options.threads),
            "NUMBA_NUM_THREADS": str(options.threads),
        }
        command = [
            pythons.get(name, sys.executable),
            __file__,
            options.dataset,
            "-o",
            options.output,
        ]
        command += ["--time", options.time, "--child", name]
        with (options.output / f"{name}.log").open("w") as log:
            subprocess.run(
                list(map(str, command)), env=environment, stdout=log, stderr=log, check=False
            )
        print(f"{name} done", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(run, names))
    print(
        f"| {options.time}, {options.threads} thread(s) | Dice | parameters | patches/s | patches |"
        " inference s |"
    )
    print("|---|---|---|---|---|---|")
    for name in names:
        path = options.output / f"{name}.json"
        if not path.exists():
            print(f"| {name} | failed; see {name}.log | | | | |")
            continue
        facts = json.loads(path.read_text())
        print(
            f"| {name} | {facts['dice']:.3f} | {facts['parameters'] / 1e6:.2f} M |"
            f" {facts['patches_a_second']:.2f} | {facts['patches']} of"
            f" {'x'.join(map(str, facts['patch']))} | {facts['inference_s']:.2f} |"
        )


if __name__ == "__main__":
    main()
