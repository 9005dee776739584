"""Words of other tools: who types one is told in a sentence how it is done here."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from medseg.cli.help import takes_value

_INFER = "medseg infer SCAN -o OUTPUT segments a scan or a folder of scans"
_TRAIN = "medseg train DATASET plans, preprocesses and trains in one go"
_EVALUATE = "medseg evaluate REFERENCE PREDICTION scores label maps"
_TASK = "a task is a model here: -m MODEL, where medseg models lists them; --roi names structures"
_MODELS = "medseg models lists the models that are here; others are given by their folder with -m"

#: Commands of other tools, and what people try first; by their words in lower case.
COMMANDS = {
    **dict.fromkeys(
        (
            "predict", "segment", "seg", "segmentation", "run", "apply", "inference", "label",
            "parcellate", "nnunet_predict", "nnunetv2_predict", "nnunetv2_predict_from_modelfolder",
            "totalsegmentator", "mri_synthseg", "synthseg", "recon-all", "samseg", "aseg",
            "fast", "first", "run_first_all", "auto3dseg", "fastsurfer", "lungmask",
        ),
        _INFER,
    ),
    **dict.fromkeys(
        ("mri_synthstrip", "synthstrip", "hd-bet", "hd_bet", "bet", "bet2", "strip", "skullstrip"),
        "medseg infer SCAN --also stripped,brain-mask strips the skull",
    ),
    **dict.fromkeys(
        (
            "plan", "preprocess", "plan_and_preprocess", "fingerprint",
            "extract_fingerprint", "nnunet_plan_and_preprocess", "nnunetv2_plan_and_preprocess",
            "nnunetv2_plan_experiment", "nnunetv2_preprocess", "nnunetv2_extract_fingerprint",
            "fit", "finetune", "fine-tune", "tune", "learn", "nnunet_train", "nnunetv2_train",
            "resume", "continue",
        ),
        f"{_TRAIN}; the same command goes on after an interruption",
    ),
    **dict.fromkeys(
        (
            "eval", "score", "dice", "metrics", "test", "validate", "nnunetv2_evaluate_folder",
            "nnunetv2_evaluate_simple", "nnunet_evaluate_folder", "compute_metrics",
        ),
        _EVALUATE,
    ),
    **dict.fromkeys(
        ("ensemble", "nnunetv2_ensemble", "nnunet_ensemble", "nnunetv2_find_best_configuration"),
        "medseg infer SCAN -m MODEL -m MODEL averages models",
    ),
    **dict.fromkeys(
        ("postprocess", "nnunetv2_apply_postprocessing", "cleanup", "keep_largest", "fslmaths"),
        "medseg clean LABELS -o OUTPUT --keep-largest cleans a label map",
    ),
    **dict.fromkeys(
        (
            "stats", "statistics", "volume", "measure", "mri_segstats", "asegstats2table",
            "fslstats", "radiomics",
        ),
        "medseg volumes LABELS -o TABLE.csv measures label maps",
    ),
    **dict.fromkeys(
        ("show", "open", "plot", "visualize", "visualise", "preview", "display", "freeview",
         "itksnap", "itk-snap", "fsleyes", "slicer"),
        "medseg view SCAN LABELS makes a page, a picture or a scene for 3D Slicer",
    ),
    **dict.fromkeys(
        ("list", "ls", "model", "tasks", "zoo"), _MODELS
    ),
    **dict.fromkeys(
        ("labels", "structures", "classes"), "medseg info MODEL lists the structures of a model"
    ),
    **dict.fromkeys(
        (
            "download", "install", "fetch", "pull", "totalseg_download_weights",
            "nnunetv2_install_pretrained_model_from_zip",
            "nnunet_install_pretrained_model_from_zip", "totalseg_import_weights", "weights",
        ),
        "nothing is downloaded; a model of nnU-Net or MONAI is given by its folder or zip with -m",
    ),
    **dict.fromkeys(
        ("dicom2nifti", "dcm2niix", "dcm2nii", "mri_convert", "conv", "export_nifti", "resave",
         "nnunetv2_convert_msd_dataset", "nnunetv2_convert_old_nnunet_dataset", "itkimage2segimage",
         "segimage2itkimage"),
        "medseg convert INPUT OUTPUT converts; the suffix of OUTPUT decides the format",
    ),
    **dict.fromkeys(
        ("inspect", "header", "mri_info", "fslinfo", "fslhd", "nib-ls", "describe"),
        "medseg info FILE says what is in a file",
    ),
    **dict.fromkeys(
        ("verify", "verify_dataset_integrity", "qc", "nnunetv2_verify_dataset_integrity"),
        "medseg check DATASET checks a data set before training",
    ),
    **dict.fromkeys(
        ("storescp", "receive", "node"),
        "medseg listen -o FOLDER receives DICOM and segments it",
    ),
    **dict.fromkeys(
        ("server", "monailabel", "start_server", "annotate"),
        "medseg serve STUDIES serves scans and models to 3D Slicer's module MONAI Label",
    ),
    **dict.fromkeys(
        ("cohort", "many", "bulk", "parallel", "bids"),
        "medseg batch COHORT -o FOLDER segments thousands of scans",
    ),
    **dict.fromkeys(
        ("onnx", "nnunetv2_export_model_to_zip"), "medseg export MODEL writes a model as ONNX"
    ),
    **dict.fromkeys(
        ("mesh", "meshes", "surface", "surfaces", "stl", "obj", "gltf", "glb", "mri_tessellate",
         "mris_convert"),
        "medseg export LABELS --stl FOLDER, --obj FILE or --gltf FILE writes surfaces",
    ),
    "help": "medseg COMMAND --help explains a command, medseg --help lists them",
}  # fmt: skip

#: Options of other tools where scans are segmented, and how it is said here.
_SEGMENTING = {
    **dict.fromkeys(
        ("-i", "--i", "--input", "--in", "--image", "--images", "--scan", "--input_folder"),
        "scans are named without an option: medseg {command} SCAN -o OUTPUT",
    ),
    **dict.fromkeys(
        ("--o", "--out", "--output_folder", "--output_dir", "--outdir", "--seg"),
        "the output is given with -o or --output",
    ),
    **dict.fromkeys(("-ta", "--task", "-t", "--task_name", "--dataset", "-d"), _TASK),
    **dict.fromkeys(
        ("-f", "--fast", "-ff", "--fastest"),
        "a faster model is another model, where there is one: -m brain-fast",
    ),
    "--robust": "the embedded model takes any contrast; --force runs a model where it makes no"
    " sense",
    **dict.fromkeys(
        ("-ml", "--ml", "--multilabel"), "one label map with all structures is what is written"
    ),
    **dict.fromkeys(
        ("-ot", "--output_type", "--format", "--ext"),
        "the suffix of -o decides the format: .nii.gz, .nrrd, .seg.nrrd, .mha, .mgz or .dcm",
    ),
    **dict.fromkeys(
        ("-rs", "--roi_subset", "-rsr", "--roi_subset_robust", "--structures", "--labels",
         "--classes", "--organ", "--organs"),
        "structures are chosen with --roi, with commas between them: --roi liver,spleen",
    ),
    **dict.fromkeys(
        ("-s", "--statistics", "--stats", "--vol", "--volumes", "-r", "--radiomics"),
        "volumes stand in the record beside the labels; --also volumes writes them as a table",
    ),
    **dict.fromkeys(("--parc", "--parcellation"), "the parcels are there if the model has them: "
                    "medseg models lists the models"),
    **dict.fromkeys(("--qc",), "doubts stand in the record; --strict ends with 8 if there are any"),
    **dict.fromkeys(
        ("--resample", "--crop", "--keepgeom"),
        "labels lie on the scan's own grid; medseg reads and resamples by itself",
    ),
    **dict.fromkeys(
        ("--post", "--save_probabilities", "--posteriors", "--prob"),
        "probabilities of structures are asked for with --probabilities NAMES",
    ),
    **dict.fromkeys(("--cpu", "--gpu", "--cuda", "-device", "--use_gpu"),
                    "the device is chosen with --device cpu or --device cuda"),
    **dict.fromkeys(
        ("--threads", "--nr_thr_resamp", "--nr_thr_saving", "-npp", "-nps", "--num_workers", "-j",
         "--jobs", "-nproc"),
        "medseg uses all cores; medseg batch has --workers",
    ),
    **dict.fromkeys(("--disable_tta", "--test_time_augmentation"),
                    "mirroring is chosen with --tta and --no-tta"),
    **dict.fromkeys(("-step_size", "--step_size", "--tile_step_size"),
                    "windows overlap by --overlap, which is 1 less the step size"),
    **dict.fromkeys(("-chk", "--checkpoint_name"),
                    "weights are chosen with --checkpoint final, best or latest"),
    **dict.fromkeys(("-c", "-tr", "-p", "--trainer", "--plans", "--configuration", "--config"),
                    "a model of nnU-Net is given whole: -m FOLDER, that of its configuration"),
    **dict.fromkeys(("--fold",), "folds are chosen with --folds"),
    **dict.fromkeys(("--ct", "--modality", "--contrast"),
                    "what a scan is, is seen by itself; -m brain or -m ct-tissues chooses"),
    **dict.fromkeys(("--v1", "--version1"), "models are chosen with -m"),
    **dict.fromkeys(("--continue_prediction", "--resume", "--no_overwrite"),
                    "--skip-existing skips scans that have a result; medseg batch always does"),
    **dict.fromkeys(("--overwrite", "-y"), "results are replaced unless --skip-existing is given"),
    **dict.fromkeys(("--face", "--deface"), "medseg does not deface"),
    **dict.fromkeys(("--bs", "--batch_size"), "windows at a time are --batch"),
}  # fmt: skip
#: Options of medseg's own that people write before the command.
_OURS = ("-m", "--model", "-o", "--output", "--roi", "--preview", "--also", "--device")
_TRAINING = {
    **dict.fromkeys(("-d", "-i", "--i", "--input", "--data", "--dataset", "--task"),
                    "the data set is named without an option: medseg train DATASET"),
    **dict.fromkeys(("--epochs", "--max_epochs", "--iterations", "--num_epochs", "-e"),
                    "training is given a time: --time 8h; --set train.steps=1000 counts steps"),
    **dict.fromkeys(("--lr", "--learning_rate", "-lr"),
                    "settings are changed with --set train.learning_rate=0.001"),
    **dict.fromkeys(("--bs", "--batch_size"), "settings are changed with --set train.batch=4"),
    **dict.fromkeys(("--c", "-c", "--continue"), "the same command goes on with a run by itself"),
    **dict.fromkeys(("-pretrained_weights", "--pretrained_weights", "--pretrained", "--weights"),
                    "another model's weights are the start with --finetune MODEL"),
    **dict.fromkeys(("--npz", "--val"), "a run scores itself at its end"),
    **dict.fromkeys(("-device", "--device", "--gpu", "--gpus", "-num_gpus"),
                    "a GPU is used where there is one; CUDA_VISIBLE_DEVICES and torchrun choose"),
    **dict.fromkeys(("--arch", "--network", "-tr", "--architecture"),
                    "the architecture is chosen with --model"),
    **dict.fromkeys(("--out", "--o", "--output_dir"), "the run folder is given with -o"),
}  # fmt: skip
_SCORING = {
    **dict.fromkeys(
        ("-i", "--i", "--input", "--pred", "--prediction", "-gt", "--gt", "--reference", "-ref",
         "-pred", "--truth", "-r", "-p"),
        "both are named without an option: medseg evaluate REFERENCE PREDICTION",
    ),
    **dict.fromkeys(("-djfile", "-pfile", "--metrics", "-m"), "all scores are computed"),
    **dict.fromkeys(("--o", "--out", "--output_file"), "the folder of results is given with -o"),
}  # fmt: skip
_ANY = {
    **dict.fromkeys(("-i", "--i", "--in", "--input"), "files are named without an option"),
    **dict.fromkeys(("--o", "--out"), "the output is given with -o"),
    **dict.fromkeys(("--verbose_level", "--debug"), "-v tells each step, -vv all there is"),
    "--silent": "--quiet or -q",
    "--logfile": "--log FILE",
}
OPTIONS = {
    "infer": _SEGMENTING,
    "batch": _SEGMENTING,
    "listen": _SEGMENTING,
    "train": _TRAINING,
    "evaluate": _SCORING,
}


def check_command(program: Any, ctx: Any, words: Sequence[str]) -> None:
    """End with a sentence where the first word is no command but a scan, or a word of another
    tool.
    """
    if not words or words[0] in program.commands:
        return
    word = words[0]
    if word.startswith("-"):
        is_for_scans = word.partition("=")[0] in (*_SEGMENTING, *_OURS)
        if is_for_scans and word not in _names_of(program.get_params(ctx)):
            _end(f"{word}: say what to do first; {_INFER}")
        return
    plain = word.lower()
    plain = plain if plain in COMMANDS else plain.replace("-", "_")
    if plain in COMMANDS:
        _end(f"there is no command {word}; {COMMANDS[plain]}")
    if is_file_name(word):
        _end(f"{word} is no command; {_INFER}: medseg infer {word}")
    same = plain.replace("_", "-")
    if same in program.commands and same != word:
        _end(f"there is no command {word}; write medseg {same}")


def check_options(command: Any, ctx: Any, words: Sequence[str]) -> None:
    """End with a sentence where an option is one of another tool, or ours written otherwise."""
    known = _names_of(command.get_params(ctx))
    hints = _ANY | OPTIONS.get(command.name, {})
    for word in options_in(command.get_params(ctx), words):
        name = word.partition("=")[0]
        if name in known:
            continue
        if name in hints:
            _end(f"{name} is no option of medseg {command.name}; {_said(hints[name], command)}")
        plain = name.lower().replace("_", "-")
        ours = next((one for one in (plain, f"-{plain}") if len(one) > 2 and one in known), "")
        if ours and name not in known:
            _end(f"{name} is no option of medseg {command.name}; write {ours}")


def is_file_name(word: str) -> bool:
    """Whether a word names a file or folder, rather than a command."""
    return (
        "/" in word or os.sep in word or bool(re.search(r"\.\w{2,5}$", word)) or Path(word).exists()
    )


def _said(hint: str, command: Any) -> str:
    return hint.format(command=command.name)


def _names_of(params: Iterable[Any]) -> set[str]:
    return {"--help", "-h"} | {
        name
        for one in params
        if one.param_type_name == "option"
        for name in (*one.opts, *one.secondary_opts)
    }


def options_in(params: Iterable[Any], words: Sequence[str]) -> Iterator[str]:
    """The words that are options, not what stands behind one."""
    taking = {
        name
        for one in params
        if one.param_type_name == "option" and takes_value(one)
        for name in one.opts
    }
    is_value = False
    for word in words:
        if word == "--":
            return
        if not is_value and re.match(r"-[^\d]", word):
            yield word
        is_value = not is_value and word in taking


def check_not_empty(command: Any, ctx: Any, words: Sequence[str]) -> None:
    """End with a sentence where a file or the value of an option is empty, as a variable of the
    shell is that is not set: an empty path is the folder one is in, and an empty option nothing.
    """
    options = {
        name: one
        for one in command.get_params(ctx)
        if one.param_type_name == "option" and takes_value(one)
        for name in one.opts
    }
    for name in _empty_of(words, options):
        if name not in options:
            _end(f"a word after {command.name} is empty; is a variable of the shell not set?")
        if options[name].default != "":
            _end(f"the value of {name} is empty; is a variable of the shell not set?")


def _empty_of(words: Sequence[str], options: Collection[str]) -> Iterator[str]:
    """For each empty word the option whose value it is, or "" where it is that of none."""
    before = ""
    for word in words:
        name, equals, value = word.partition("=")
        if not word:
            yield before
        elif not before and equals and not value and name in options:
            yield name
        before = word if not before and word in options else ""


def _end(text: str) -> None:
    """One sentence, and the exit code of wrong usage."""
    typer.echo(f"medseg: {text}", err=True)
    raise typer.Exit(2)
