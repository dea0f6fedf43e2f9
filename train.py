"""Train a compact student on PASCAL VOC 2012, alone or taught by a larger network.

    python train.py --model ultracompact --kd_mode none --save_dir runs/voc
    python train.py --model ultracompact --kd_mode response --save_dir runs/voc
    python train.py --model ultracompact --kd_mode feature --save_dir runs/voc
    python train.py --data_root sample --no_pretrained --epochs 3 --save_dir runs/try  # no download
    torchrun --nproc_per_node=2 train.py ...                                           # two GPUs

One loop for all modes: the mode changes the criterion, nothing else. The same command again
continues a run that was cut off, from its last whole epoch, to the same weights (bit by bit on a
CPU; on a GPU some sums are taken in any order).

Leaves in --save_dir, {run} being {model}_{kd_mode}:
    best_model_{run}.pth       the weights with the best val mIoU      (test.py reads these)
    last_{run}.pth             everything a resume needs, every epoch
    epoch_{n}_{run}.pth        a kept copy of the weights every 10 epochs
    training_report_{run}.txt, training_curves_{run}.png, history_{run}.jsonl
"""

import argparse
import contextlib
import copy
import errno
import hashlib
import io
import json
import math
import os
import random
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import kd_losses
import voc_data
from voc_data import DataError, UsageError, write_figure, write_whole

# Settings that may change when a run is continued. Most do not change what it computes. Another
# device rounds in its own way, and more so where --amp auto chooses another dtype for it; another
# number of epochs bends the schedule from there on; another patience ends it elsewhere.
FREE_ON_RESUME = {
    "resume", "overwrite", "device", "amp_dtype", "workers", "save_dir", "data_root", "cache_dir",
    "pixel_cache", "epochs", "patience", "checkpoint_interval",
}  # fmt: skip
FROZEN_LEVELS = {"none": (), "low": ("low",), "mid": ("low", "mid")}  # of --freeze
SAVE_AGAIN_AFTER = (2, 20, 60)  # seconds, where a folder does not take a file at once
CHECK_EVERY = 20  # steps between looks at the loss: each look makes the host wait for the device


def get_args_parser():
    parser = argparse.ArgumentParser(
        description="Train a compact segmentation network on VOC 2012, with or without a teacher.",
        formatter_class=voc_data.HelpFormatter,
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=kd_losses.STUDENTS, default="ultracompact", help="student"
    )
    group.add_argument(
        "--no_pretrained", action="store_true", help="start from random, not ImageNet, weights"
    )
    group.add_argument(
        "--init", metavar="FILE", help="start from the weights of a checkpoint of the same --model"
    )
    group.add_argument(
        "--freeze", choices=("none", "low", "mid"), default="none", help="keep the backbone as it "
        "is up to the features of this level, norms too: cheaper steps",
    )  # fmt: skip

    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--kd_mode", choices=kd_losses.KD_MODES, default="none", help="what is learnt "
        "from the teacher: nothing, its output distributions, or its features",
    )  # fmt: skip
    group.add_argument(
        "--teacher", default="fcn_resnet50", help="a torchvision segmentation model, a checkpoint "
        "(.pth) of this project, or a .pt2 file of torch.export",
    )  # fmt: skip
    group.add_argument(
        "--teacher_weights", metavar="FILE", help="a state dict for --teacher, on disk"
    )
    group.add_argument("--temperature", type=float, default=1.0, help="T of the response loss")
    group.add_argument("--alpha", type=float, default=1.0, help="weight of the cross-entropy")
    group.add_argument(
        "--beta", type=float, help="weight of the distillation loss (default: 1 for response, 5 "
        "for feature)",
    )  # fmt: skip
    group.add_argument(
        "--kd_levels", nargs="+", choices=kd_losses.LEVELS, default=["high"],
        help="levels that feature mode matches",
    )  # fmt: skip
    group.add_argument(
        "--teacher_cache", choices=("auto", "none"), default="auto", help="auto: ask the teacher "
        "once about each whole image and keep it on disk; none: ask it about every training crop",
    )  # fmt: skip
    group.add_argument(
        "--teacher_size", type=int, help="longest side the teacher sees, in pixels; 0: the image's "
        f"own (default: what a student was made for, {kd_losses.TEACHER_SIZE} for other teachers)",
    )  # fmt: skip
    group.add_argument(
        "--extra_images", metavar="DIR", help="photographs without masks, for the distillation "
        "term alone; 'voc' takes every JPEG of the VOC tree that has no mask",
    )  # fmt: skip

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root", help="where VOC 2012 is, in any usual layout, or 'sample'; without it, "
        "looks in ./data, /content/data and kagglehub's cache, then downloads",
    )  # fmt: skip
    group.add_argument("--train_split", default="train", help="list in ImageSets/Segmentation")
    group.add_argument("--val_split", default="val", help="the same, for validation")
    group.add_argument(
        "--allow_val_in_train", action="store_true", help="train on images that are validated on"
    )
    group.add_argument("--crop_size", type=int, default=256, help="side of a training crop, pixels")
    group.add_argument(
        "--early_epochs", type=int, default=0, help="so many epochs first on smaller pictures: "
        "cheaper steps while there is most to learn",
    )  # fmt: skip
    group.add_argument(
        "--early_crop", type=int, default=160, help="side of a crop in those; --scale shrinks by "
        "as much",
    )  # fmt: skip
    group.add_argument(
        "--scale", type=float, nargs=2, default=(0.5, 2.0), metavar=("MIN", "MAX"),
        help="random scale of a training image",
    )  # fmt: skip
    group.add_argument("--colour_jitter", type=float, default=0.3, help="strength, 0..1")
    group.add_argument(
        "--cutmix", type=float, default=0.0, metavar="P", help="share of the steps in which each "
        "image gets a rectangle of another: for long runs on few images",
    )  # fmt: skip
    group.add_argument(
        "--eval_size", type=int, default=0, help="longest side in validation; 0 keeps the image's"
    )
    group.add_argument(
        "--pixel_cache", choices=("auto", "none"), default="auto", help="auto: decode each JPEG "
        "once into a file of pixels, if the disk has room; none: decode in every epoch",
    )  # fmt: skip
    group.add_argument("--cache_dir", default="cache", help="where both caches are kept")
    group.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), help="loader processes"
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=60, help="passes over the training images")
    group.add_argument(
        "--epoch_images", type=int, default=0, help="images that count as an epoch, all processes "
        "together; 0: as many as there are. Equal budgets where the numbers of images differ",
    )  # fmt: skip
    group.add_argument("--batch_size", type=int, default=16, help="images a step, for each process")
    group.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="update rule")
    group.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (of the head)")
    group.add_argument(
        "--backbone_lr_factor", type=float, default=0.3, help="the rate of a pretrained backbone "
        "over --lr",
    )  # fmt: skip
    group.add_argument("--weight_decay", type=float, default=0.01, help="not on norms and biases")
    group.add_argument(
        "--schedule", choices=("poly", "cosine"), default="poly", help="rate by step"
    )
    group.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    group.add_argument(
        "--class_balance", type=float, default=0.5, metavar="P", help="weigh a pixel by the share "
        "of its class to the power -P, in the cross-entropy and the response loss; 0: all alike",
    )  # fmt: skip
    group.add_argument(
        "--loss_stride", type=int, default=4, help="the losses look at every n-th pixel in each "
        "direction; 4 is the student's own resolution, 1 takes all pixels and most of the time",
    )  # fmt: skip
    group.add_argument(
        "--ema", type=float, default=0.998, help="decay of the averaged weights; 0: off"
    )
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    group.add_argument(
        "--amp", choices=("auto", "off", "float16", "bfloat16"), default="auto",
        help="mixed precision; auto: the best of the GPU, off elsewhere",
    )  # fmt: skip

    group = parser.add_argument_group("run")
    group.add_argument("--save_dir", default="checkpoints", help="where results are written")
    group.add_argument(
        "--resume", default="auto", metavar="auto|none|FILE", help="auto: continue from "
        "last_*.pth in --save_dir if it is there; none: start afresh; FILE: continue from it",
    )  # fmt: skip
    group.add_argument(
        "--overwrite", action="store_true", help="allow a fresh start to replace older results"
    )
    group.add_argument("--val_every", type=int, default=1, help="epochs between validations")
    group.add_argument(
        "--patience", type=int, default=0, help="stop after so many validations without a better "
        "mIoU; 0: never",
    )  # fmt: skip
    group.add_argument("--checkpoint_interval", type=int, default=10, help="epochs per kept copy")
    return parser


def main(args):
    check_args(args)
    setup_processes(args)
    if args.rank == 0:  # which alone writes results
        voc_data.check_writable(args.save_dir, "--save_dir")
    voc_data.check_writable(args.cache_dir, "--cache_dir")
    run_name = f"{args.model}_{args.kd_mode}"
    files = RunFiles(Path(args.save_dir), run_name)
    resumed = from_first(args, lambda: find_resume(args, files))
    init = None
    if args.init:
        init, args.init_digest = from_first(args, lambda: read_init(args, files, resumed))
    if resumed and resumed["epoch"]:
        init = resumed.get("student")  # whatever it started from need not be there any more

    root, train_items, val_items = find_data(args)
    args.data_key = data_key(train_items, val_items)
    args.teacher_digest = teacher_digest(args)
    if resumed and resumed["epoch"]:
        check_same_settings(args, resumed)
    teacher = build_teacher(args)
    if not resumed:
        begin_afresh(args, files)
    train_data, val_data = build_loaders(args, train_items, val_items, teacher)
    class_weights = from_first(args, lambda: find_class_weights(args, train_data))
    # Just before the student is made: one seed gives all modes the same start.
    seed_everything(args.seed, epoch=0, rank=args.rank)
    steps_per_epoch = len(train_data[args.crop_size])
    trainer = Training(args, teacher, steps_per_epoch, class_weights, init)
    if resumed and resumed["epoch"]:
        trainer.load_state_dict(resumed)
    if resumed:
        bring_along(args, trainer, files, resumed)
    args.data_summary = summarise_data(root, train_items, val_items)
    describe_run(args, root, trainer)
    if trainer.epoch >= args.epochs:
        say(args, f"all {args.epochs} epochs are done: nothing left to train (--resume none "
                  "--overwrite starts afresh)")  # fmt: skip

    try:
        run_epochs(args, trainer, train_data, val_data, files)
    except (KeyboardInterrupt, SystemExit, RuntimeError) as error:
        again = "again" if args.resume == "auto" else "with --resume auto"
        if not voc_data.out_of_memory(error):
            say(args, f"\nstopped in epoch {trainer.saved + 1}; {trainer.saved} whole epochs are "
                      f"saved. The same command {again} goes on from there.")  # fmt: skip
        raise
    if dist.is_initialized():  # not after an error: nccl would wait here for the other processes
        dist.destroy_process_group()


def run_epochs(args, trainer, train_data, val_data, files):
    """Train to the end, or until patience runs out; save after every epoch."""
    while trainer.epoch < args.epochs and not trainer.out_of_patience():
        record = trainer.train_one_epoch(train_data[crop_of_epoch(args, trainer.epoch)])
        last = trainer.epoch + 1 == args.epochs
        if (trainer.epoch + 1) % args.val_every == 0 or last:
            record |= trainer.validate(val_data)
        trainer.finish_epoch(record)
        if args.rank == 0:
            save_patiently(args, trainer, files)
            trainer.saved = trainer.epoch
            print(epoch_line(args, trainer.history), flush=True)
    if trainer.out_of_patience():
        say(args, f"no better mIoU in {args.patience} validations: stopped early")
    if args.rank == 0:
        write_summary(args, trainer, files)
        best = trainer.best
        print(f"best val mIoU {best['miou']:.4f} (epoch {best['epoch']}) | "
              f"{trainer.parameters:,} parameters | score {trainer.score(best['miou']):.4f} | "
              f"{files.best}")  # fmt: skip


# ------------------------------------------------------------------------------------- checks


def check_args(args):
    """Refuse values that cannot work, before anything is written; choose those left open."""
    rules = [
        ("epochs", args.epochs >= 1, "at least 1"),
        ("epoch_images", args.epoch_images >= 0, "0 or more"),
        ("batch_size", args.batch_size >= 1, "at least 1"),
        ("lr", args.lr > 0, "positive"),
        ("temperature", args.temperature > 0, "positive"),
        ("alpha", args.alpha >= 0, "0 or more"),
        ("beta", args.beta is None or args.beta >= 0, "0 or more"),
        ("crop_size", args.crop_size >= 33, "at least 33"),
        ("early_epochs", args.early_epochs >= 0, "0 or more"),
        ("early_crop", args.early_crop >= 33, "at least 33"),
        (
            "scale",
            0 < args.scale[0] <= args.scale[1] < math.inf,
            "two positive numbers, the smaller first",
        ),
        ("seed", 0 <= args.seed < 2**31, "in 0..2147483647"),
        ("colour_jitter", 0 <= args.colour_jitter <= 1, "in 0..1"),
        ("cutmix", 0 <= args.cutmix <= (args.batch_size > 1), "in 0..1, and 0 at --batch_size 1"),
        ("class_balance", 0 <= args.class_balance <= 1, "in 0..1"),
        ("eval_size", args.eval_size == 0 or args.eval_size >= 33, "0, or at least 33"),
        ("teacher_size", not args.teacher_size or args.teacher_size >= 33, "0, or at least 33"),
        ("workers", args.workers >= 0, "0 or more"),
        ("weight_decay", args.weight_decay >= 0, "0 or more"),
        ("backbone_lr_factor", args.backbone_lr_factor >= 0, "0 or more"),
        ("warmup", args.warmup >= 0, "0 or more"),
        ("ema", 0 <= args.ema < 1, "in 0..1, 1 excluded"),
        ("loss_stride", args.loss_stride in (1, 2, 4, 8), "1, 2, 4 or 8"),
        ("val_every", args.val_every >= 1, "at least 1"),
        ("patience", args.patience >= 0, "0 or more"),
        ("checkpoint_interval", args.checkpoint_interval >= 1, "at least 1"),
    ]
    voc_data.check_flags(args, rules)
    if args.beta is None:
        args.beta = {"none": 0.0, "response": 1.0, "feature": 5.0}[args.kd_mode]
    frozen = [level for level in args.kd_levels if level in FROZEN_LEVELS[args.freeze]]
    if args.kd_mode == "feature" and frozen:
        raise UsageError(
            f"--kd_levels {' '.join(frozen)} cannot learn under --freeze {args.freeze}: match "
            "other levels or freeze less"
        )
    if args.init and args.no_pretrained:
        raise UsageError("--init and --no_pretrained name two different starts: choose one")
    if args.extra_images and args.kd_mode == "none":
        raise UsageError("--extra_images has no masks to learn from without a teacher (--kd_mode)")
    args.scale = list(args.scale)
    if args.teacher_size is None:
        args.teacher_size = kd_losses.TEACHER_SIZE
        if args.kd_mode != "none":
            args.teacher_size = kd_losses.size_made_for(args.teacher)


def find_resume(args, files):
    """The state to continue from, or None for a fresh start that is allowed to write."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, itself
    resume = "auto" if restarted and files.last.is_file() else args.resume
    path = {"auto": files.last, "none": None}.get(resume, Path(resume))
    if resume == "auto" and not path.is_file():
        path = None
    there = [file for file in (files.best, files.last) if file.exists()]
    if there and not args.overwrite and (path is None or not same_path(path, files.last)):
        raise UsageError(
            f"{there[0]} exists and is not what would be continued: name another --save_dir, or "
            "allow the replacement with --overwrite"
        )
    if path is None:
        return None
    try:
        state = kd_losses.read_checkpoint(path)
    except DataError as error:
        hint = "Start afresh with --resume none --overwrite, or from a kept epoch_*.pth with --init"
        raise DataError(f"{error}. {hint}") from error
    parts = {"optimizer": dict, "settings": dict, "epoch": int}
    if not isinstance(state, dict) or any(
        not isinstance(state.get(name), kind) for name, kind in parts.items()
    ):
        raise DataError(f"{path} is not a last_*.pth of train.py: it cannot be continued from")
    return state | {"path": str(path)}


def same_path(first, second):
    """True if two paths lead to one file, there or not."""
    return Path(first).resolve() == Path(second).resolve()


def begin_afresh(args, files):
    """Replace the `last` of an older run by one that says "nothing done yet".

    A run that is cut off while it fills its caches, or in its first epoch, must not go on as the
    older one.
    """
    if args.rank == 0 and files.last.exists():
        save_whole(nothing_done(args), files.last)


def bring_along(args, trainer, files, resumed):
    """Copy a state from elsewhere, and the best weights beside it if they are its own.

    Where those are missing, here or there, the averaged weights of the state are the best there
    are, if they were validated. A run that is cut off before its next epoch ends must find its own
    start in --save_dir.
    """
    here = same_path(resumed["path"], files.last)
    best = Path(resumed["path"]).with_name(files.best.name)
    its_epoch = resumed.get("best", trainer.best)["epoch"]  # none in a run that has done nothing
    # A run killed between the writing of `best` and `last` has a best of the epoch to be repeated.
    fitting = (its_epoch, resumed["epoch"] + 1) if here else (its_epoch,)
    has_best = from_first(args, lambda: epoch_of(best) in fitting)
    if here and (has_best or not its_epoch):
        return
    if not has_best:
        if its_epoch:
            say(args, f"{best} is not there or of another run: the best epoch is looked for anew")
        trainer.forget_best()
    if args.rank == 0:
        if has_best:
            write_whole(best.read_bytes(), files.best)
        elif trainer.best["epoch"]:
            save_whole(trainer.shipped(), files.best)
        save_whole(trainer.state_dict(), files.last)


def epoch_of(path):
    """The epoch of a best_model file; None where there is none that can be read."""
    with contextlib.suppress(DataError):
        return kd_losses.read_checkpoint(path).get("epoch")


def nothing_done(args):
    """The content of a `last` file before the first epoch."""
    return {"epoch": 0, "optimizer": {}, "settings": settings_of(args)}


def check_same_settings(args, resumed):
    """Refuse to continue a run with other settings, and say which."""
    now, defaults = settings_of(args), vars(get_args_parser().parse_args([]))
    # A setting that the version before did not have, and that is off by default, was off.
    off = {name: value for name, value in defaults.items() if value in voc_data.OFF}
    before = off | {"teacher_digest": args.teacher_digest} | resumed["settings"]
    differing = [
        f"{name} (was {before.get(name)}, now {now.get(name)})"
        for name in sorted(now.keys() | before.keys())
        if name not in FREE_ON_RESUME and now.get(name) != before.get(name)
    ]
    if args.epochs < resumed["epoch"]:
        differing.append(f"epochs ({resumed['epoch']} are done, now {args.epochs})")
    if differing:
        raise UsageError(
            f"cannot continue {args.model}_{args.kd_mode} with other settings: "
            f"{'; '.join(differing)}. Nothing was changed. Use the old settings, another "
            "--save_dir, or --resume none --overwrite to start afresh"
        )


def settings_of(args):
    """The flags as plain values, for checkpoints and reports; paths by their last part alone."""
    hidden = {"rank", "world_size", "torch_device", "data_summary"}
    settings = {name: value for name, value in vars(args).items() if name not in hidden}
    settings["processes"] = args.world_size
    amp_dtype = choose_amp(args.amp, args.torch_device)
    settings["amp_dtype"] = str(amp_dtype).removeprefix("torch.") if amp_dtype else None
    paths = (
        "data_root", "extra_images", "teacher", "teacher_weights", "init", "save_dir", "cache_dir",
    )  # fmt: skip
    for name in paths:
        settings[name] = Path(settings[name]).name if settings[name] else None
    if args.kd_mode == "none":
        settings["teacher"] = None
    return settings


# ----------------------------------------------------------------------------------- processes


def setup_processes(args):
    """Choose the device, and join the other processes if torchrun started several."""
    args.rank = int(os.environ.get("RANK", 0))
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    args.torch_device = voc_data.choose_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    choose_amp(args.amp, args.torch_device)  # refused now if it cannot be, not after the caches
    if args.world_size > 1 and args.device and ":" in args.device:
        raise UsageError(f"--device {args.device}: torchrun gives each process a device of its own")
    if args.world_size > 1 and args.torch_device.type == "mps":
        args.torch_device = torch.device("cpu")  # gloo does not know MPS
    if args.torch_device.type == "cuda":
        torch.cuda.set_device(args.torch_device)
    if args.world_size > 1 and not dist.is_initialized():
        backend = "nccl" if args.torch_device.type == "cuda" else "gloo"
        wait = timedelta(hours=2)  # the others wait while the first fills the caches
        # After a restart by torchrun, the addresses of the processes that died must not be found.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=args.rank == 0
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") != "True",
            timeout=wait,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt{attempt}", store),
            rank=args.rank,
            world_size=args.world_size,
            timeout=wait,
        )


def say(args, text):
    """Print on the first process alone."""
    if args.rank == 0:
        print(text, flush=True)


def seed_everything(seed, epoch, rank):
    """Make all that is random a function of (seed, epoch, rank), so that a resume needs no more."""
    torch.manual_seed(seed * 1_000_003 + epoch * 1_009 + rank)
    np.random.seed((seed * 1_000_003 + epoch * 1_009 + rank) % 2**32)
    random.seed(seed * 1_000_003 + epoch * 1_009 + rank)


def local_first(args, work):
    """Run `work()` on one process of each machine before the others, which find its result."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank == 0:
        result = work()
    if dist.is_initialized():
        dist.barrier()
    return result if local_rank == 0 else work()


def from_first(args, work):
    """The result of `work()` on the first process, on all of them."""
    result = [work() if args.rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    return result[0]


# ---------------------------------------------------------------------------------------- data


def find_data(args):
    """The VOC folder, the training items (extra images last) and the validation items."""
    root = local_first(args, lambda: voc_data.find_voc(args.data_root, download=True))
    train_items = voc_data.list_items(root, args.train_split)
    val_items = voc_data.list_items(root, args.val_split)
    val_ids = {item.id for item in val_items}
    if args.extra_images:
        excluded = {item.id for item in train_items} | val_ids
        train_items += voc_data.list_extra_images(args.extra_images, root, excluded)
    shared = sorted(val_ids & {item.id for item in train_items})
    if shared and not args.allow_val_in_train:
        raise UsageError(
            f"{len(shared)} images of --train_split {args.train_split} are in --val_split "
            f"{args.val_split} too ({', '.join(shared[:3])}, ...): the report would be on images "
            "that were trained on. Choose other lists, or ask for it with --allow_val_in_train"
        )
    images = args.epoch_images or len(train_items)
    voc_data.check_batch_size(args.batch_size, images, args.world_size)
    return root, train_items, val_items


def data_key(train_items, val_items):
    """A short key of which images a run trains and validates on, wherever they lie."""
    names = "\n".join(item.id for item in train_items) + "\n\n"
    names += "\n".join(item.id for item in val_items)
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def teacher_digest(args):
    """A short key of the teacher's files: another teacher under the same name makes another run.

    None without a teacher, and for one that torchvision knows by its name.
    """
    names = (args.teacher, args.teacher_weights) if args.kd_mode != "none" else ()
    files = [Path(name) for name in names if name and Path(name).is_file()]
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:12] if files else None


def build_teacher(args):
    """The frozen teacher of a run; None in mode none."""
    if args.kd_mode == "none":
        return None
    teacher = local_first(
        args,
        lambda: kd_losses.load_teacher(args.teacher, args.teacher_weights, args.torch_device),
    )
    if args.kd_mode == "feature":
        teacher.require(args.kd_levels)
    return teacher


def crop_of_epoch(args, epoch):
    """The side of a training crop in an epoch, counted from 0.

    A crop of 160 px has 0.4 times the pixels of one of 256 px, and most of what a picture shows can
    be learnt from a small one; the last epochs then see the size that is wanted in the end.
    Progressive learning: Tan & Le 2021, EfficientNetV2, https://arxiv.org/abs/2104.00298
    """
    return args.early_crop if epoch < args.early_epochs else args.crop_size


def build_loaders(args, train_items, val_items, teacher):
    """`({crop size: training loader}, validation loader)`, over the caches if they fit."""
    pixels = val_pixels = maps = None
    if args.pixel_cache == "auto":
        # Val as well: it is decoded for every validation, and a broken file is met before training.
        pixels, val_pixels = (
            local_first(args, lambda: voc_data.pixel_cache(items, args.cache_dir, args.workers))
            for items in (train_items, val_items)
        )
    if teacher and args.teacher_cache == "auto":
        keys = ["out"] if args.kd_mode == "response" else args.kd_levels
        source = Path(args.teacher_weights or args.teacher)
        identity = (source.stat().st_size, source.stat().st_mtime_ns) if source.is_file() else ""
        maps = local_first(
            args,
            lambda: kd_losses.teacher_cache(
                teacher, train_items, pixels, args.cache_dir, args.teacher_size, keys,
                args.torch_device, identity,
            ),
        )  # fmt: skip
    shard = {"workers": args.workers, "rank": args.rank, "world_size": args.world_size}
    on_cuda = args.torch_device.type == "cuda"
    train_loaders = {}
    for crop in {crop_of_epoch(args, 0), args.crop_size}:
        scale = [factor * crop / args.crop_size for factor in args.scale]
        transform = voc_data.train_transform(crop, scale, args.colour_jitter)
        train_loaders[crop] = voc_data.train_loader(
            voc_data.VOCDataset(train_items, transform, pixels, maps),
            args.batch_size, seed=args.seed, epoch_images=args.epoch_images, pin_memory=on_cuda,
            **shard,
        )  # fmt: skip
    val_transform = voc_data.EvalTransform(args.eval_size)
    val_set = voc_data.VOCDataset(val_items, val_transform, val_pixels)
    return train_loaders, voc_data.eval_loader(val_set, **shard)


def find_class_weights(args, train_loaders):
    """The weights of the classes in the losses, (C,); None where all weigh alike."""
    if args.class_balance == 0:
        return None
    counts = train_loaders[args.crop_size].dataset.pixel_counts()
    return kd_losses.balanced_class_weights(counts, args.class_balance)


# ------------------------------------------------------------------------------------ training


class StudentAndAdapters(nn.Module):
    """What DistributedDataParallel wraps: the student, and the adapters of feature mode.

    `images, size of the logits -> (logits, {level: adapted features})`; the dict is empty without
    adapters.
    """

    def __init__(self, student, adapters):
        super().__init__()
        self.student, self.adapters = student, adapters

    def forward(self, images, output_size):
        logits, features = self.student(images, return_features=True, output_size=output_size)
        return logits, {level: adapt(features[level]) for level, adapt in self.adapters.items()}


def compute_losses(args, logits, features, labels, taught, class_weights):
    """The criterion of the mode: {"loss", "ce", "kd"}, float32 scalars.

    Args:
        logits: (N, C, h, w) of the student, at `--loss_stride`.
        features: {level: (N, C_l, h_l, w_l)}, adapted, in feature mode.
        labels: (N, H, W), at full resolution.
        taught: what the teacher says, by key: "out" in response mode, levels in feature mode.
        class_weights: (C,), for the cross-entropy and the response loss; None for 1 each.
    """
    size = logits.shape[-2:]
    sampled = kd_losses.labels_at(labels, size)
    losses = {"ce": kd_losses.cross_entropy(logits, sampled, class_weights)}
    if args.kd_mode == "response":
        teacher_logits = taught["out"].float()
        if teacher_logits.shape[-2:] != size:
            teacher_logits = interpolate(teacher_logits, size=size, mode="bilinear")
        losses["kd"] = kd_losses.response_based_kd_loss(
            logits, teacher_logits, sampled, args.temperature, class_weights
        )
    elif args.kd_mode == "feature":
        losses["kd"] = kd_losses.feature_based_kd_loss(features, taught, labels)
    else:
        losses["kd"] = torch.zeros_like(losses["ce"])
    losses["loss"] = args.alpha * losses["ce"] + args.beta * losses["kd"]
    return losses


class Training:
    """The state of a run, and what an epoch does to it.

    Args:
        args: the flags, with what `setup_processes` added.
        teacher: a `kd_losses.Teacher`, or None.
        steps_per_epoch: batches of one epoch, of one process.
        class_weights: (C,) weights of the classes in the losses, or None: all alike.
        init: a state dict to start from, of `--init` or of the run that goes on; or None.
    """

    def __init__(self, args, teacher, steps_per_epoch, class_weights, init=None):
        self.args, self.teacher, self.steps_per_epoch = args, teacher, steps_per_epoch
        self.device = args.torch_device
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        on_cuda = self.device.type == "cuda"
        self.student = build_student(args, init)
        self.parameters = sum(p.numel() for p in self.student.parameters())
        levels = args.kd_levels if args.kd_mode == "feature" else []
        self.adapters = kd_losses.make_adapters(
            kd_losses.feature_channels(self.student) if levels else {},
            {level: teacher.channels[level] for level in levels},
        )
        if on_cuda and args.world_size > 1:
            self.student = nn.SyncBatchNorm.convert_sync_batchnorm(self.student)
        on_mps = self.device.type == "mps"  # channels_last pays on CUDA and on the CPU
        self.memory_format = torch.contiguous_format if on_mps else torch.channels_last
        module = StudentAndAdapters(self.student, self.adapters)
        self.module = module.to(self.device, memory_format=self.memory_format)
        if args.world_size > 1:
            device_ids = [self.device.index] if on_cuda else None
            self.module = DistributedDataParallel(self.module, device_ids=device_ids)
        self.averaged = copy.deepcopy(self.student).eval().requires_grad_(False)
        # (averaged, current) tensors: the same objects for the whole run, so paired once.
        pairs = list(zip(self.averaged.state_dict().values(), self.student.state_dict().values()))
        self.float_pairs = [pair for pair in pairs if pair[0].is_floating_point()]
        self.count_pairs = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.optimizer = build_optimizer(args, self.student, self.adapters)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.amp_dtype = choose_amp(args.amp, self.device)
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.amp_dtype == torch.float16)
        self.epoch = self.saved = 0  # whole epochs done, and on disk
        self.best, self.since_best, self.history = {"miou": -1.0, "epoch": 0}, 0, []

    def autocast(self):
        """The mixed-precision context of a forward pass; does nothing when AMP is off."""
        enabled = self.amp_dtype is not None
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=enabled)

    def train_one_epoch(self, loader):
        """One pass over the training images.

        Returns:
            A line of the history: "epoch" from 1, the means over the steps of "loss", "ce" and
            "kd", the last "lr" of the head, "images" of all processes, "seconds", and
            "images_per_second".
        """
        args, start = self.args, time.time()
        seed_everything(args.seed, self.epoch, args.rank)
        loader.sampler.set_epoch(self.epoch)
        self.module.train()
        for part in frozen_parts(self.student, args.freeze):
            part.eval()  # BatchNorm keeps its statistics
        torch.backends.cudnn.benchmark = True  # all crops have one size
        totals = torch.zeros(3, device=self.device)
        recent = deque(maxlen=CHECK_EVERY)  # (loss, indices of the batch), for a message
        label = f"epoch {self.epoch + 1}/{args.epochs}"
        quiet = None if args.rank == 0 else True  # None: quiet unless a person is watching
        progress = tqdm(loader, label, unit="batch", leave=False, disable=quiet)
        for step, batch in enumerate(progress):
            losses = self.step(batch, self.epoch * self.steps_per_epoch + step)
            totals += torch.stack([losses["loss"], losses["ce"], losses["kd"]]).detach()
            recent.append((losses["loss"].detach(), batch["index"]))
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == len(loader):
                self.check_finite(recent, step, loader.dataset.items)
                progress.set_postfix(loss=f"{totals[0].item() / (step + 1):.3f}")
        if dist.is_initialized():
            dist.all_reduce(totals)
            totals /= args.world_size
            self.share_statistics()
        loss, ce, kd = (totals / len(loader)).tolist()
        seconds = time.time() - start
        images = len(loader) * args.batch_size * args.world_size
        return {
            "epoch": self.epoch + 1, "loss": loss, "ce": ce, "kd": kd,
            "lr": self.optimizer.param_groups[-1]["lr"], "images": images,
            "seconds": seconds, "images_per_second": images / seconds,
        }  # fmt: skip

    def step(self, batch, global_step):
        """One update of the weights.

        Args:
            batch: "image" (N, 3, H, W) uint8; "mask" (N, H, W), labels; "colour", the matrices of
                the colour jitter; "index" (N,); with a cached teacher its maps, each
                (N, C, h, w) float16.
            global_step: updates before this one, since the start of the run.

        Returns:
            {"loss", "ce", "kd"}: scalars on the device.
        """
        on_cuda = self.device.type == "cuda"  # elsewhere the memory of a batch is not pinned
        batch = {key: value.to(self.device, non_blocking=on_cuda) for key, value in batch.items()}
        images = voc_data.normalise(batch["image"], batch["colour"], self.memory_format)
        labels = batch["mask"]
        self.set_rate(global_step)
        with self.autocast():
            taught = self.ask_teacher(images, batch)
            if self.args.cutmix and torch.rand(()).item() < self.args.cutmix:
                images, labels, taught = voc_data.cutmix(images, labels, taught)
            logits, features = self.module(images, self.loss_size(images))
        losses = compute_losses(self.args, logits, features, labels, taught, self.class_weights)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(losses["loss"]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_average(global_step)
        return losses

    def loss_size(self, images):
        """(height, width) of the logits that the losses see."""
        return tuple(-(-side // self.args.loss_stride) for side in images.shape[-2:])  # rounded up

    def ask_teacher(self, images, batch):
        """{key: (N, C, h, w)} of the teacher: what the batch brought of its cache, else live.

        `images`: (N, 3, H, W), normalised. {} without a teacher.
        """
        if self.teacher is None:
            return {}
        cached = {key: batch[key] for key in self.teacher.channels if key in batch}
        return cached or self.teacher(images, logits=self.args.kd_mode == "response")

    def set_rate(self, step):
        """The learning rate of a step: linear warm-up, then down to 0 along the schedule."""
        total = self.args.epochs * self.steps_per_epoch
        done = min(1.0, step / total)
        factor = (1 - done) ** 0.9
        if self.args.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * done))
        factor *= min(1.0, (step + 1) / max(1, self.args.warmup))
        for group, rate in zip(self.optimizer.param_groups, self.base_rates):
            group["lr"] = rate * factor

    @torch.no_grad()
    def update_average(self, step):
        """Move the averaged weights and BatchNorm statistics towards the current ones."""
        decay = min(self.args.ema, (1 + step) / (10 + step))  # follows closely at first
        averaged, current = zip(*self.float_pairs)
        torch._foreach_lerp_(averaged, current, 1 - decay)
        averaged, current = zip(*self.count_pairs)  # BatchNorm's count of batches
        torch._foreach_copy_(averaged, current)

    def share_statistics(self):
        """Give all processes the BatchNorm statistics of the first: each saw other images."""
        for module in (self.student, self.averaged):
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def check_finite(self, recent, last_step, items):
        """Stop the run if one of the last losses is NaN or infinite."""
        losses = torch.stack([loss for loss, _ in recent])
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            step = last_step - len(recent) + 1 + bad[0]
            names = ", ".join(items[index].id for index in recent[bad[0]][1].tolist())
            raise DataError(
                f"the loss is {losses[bad[0]].item()} in epoch {self.epoch + 1}, step {step + 1} "
                f"(images {names}). Nothing of this epoch was saved. Start again with a lower --lr "
                "or --amp off, in another --save_dir or here with --resume none --overwrite"
            )

    def validate(self, loader):
        """mIoU and loss of the averaged weights on the val split, in float32 as in test.py."""
        start = time.time()
        torch.backends.cudnn.benchmark = False  # every image has a size of its own
        result = voc_data.evaluate(self.averaged, loader, self.device)
        return {
            "val_loss": result.loss, "val_miou": result.matrix.miou,
            "val_pixel_accuracy": result.matrix.pixel_accuracy, "val_seconds": time.time() - start,
        }  # fmt: skip

    def finish_epoch(self, record):
        """Count a whole epoch, and note whether it is the best so far."""
        self.epoch += 1
        self.history.append(record)
        if "val_miou" not in record:
            return
        self.since_best += 1
        if record["val_miou"] > self.best["miou"]:
            self.best = {"miou": record["val_miou"], "epoch": self.epoch}
            self.since_best = 0

    def forget_best(self):
        """Look for the best epoch anew, from the last one on if that was validated."""
        self.best, self.since_best = {"miou": -1.0, "epoch": 0}, 0
        miou = self.history[-1].get("val_miou") if self.history else None
        if miou is not None:
            self.best = {"miou": miou, "epoch": self.epoch}

    def out_of_patience(self):
        """True when early stopping is on and due."""
        return 0 < self.args.patience <= self.since_best

    def score(self, miou):
        """4 * mIoU / (1 + parameters in millions)."""
        return voc_data.score(miou, self.parameters)

    def shipped(self):
        """The content of a best_model file: the averaged weights and plain values."""
        args, weights = self.args, self.averaged.state_dict()
        return {
            "model_state_dict": {name: value.cpu() for name, value in weights.items()},
            "model": args.model, "kd_mode": args.kd_mode, "num_classes": voc_data.NUM_CLASSES,
            "eval_size": args.eval_size, "miou": self.history[-1].get("val_miou"),
            "epoch": self.epoch, "parameters": self.parameters, "settings": settings_of(args),
        }  # fmt: skip

    def state_dict(self):
        """Everything a resume needs; the random state follows from seed and epoch."""
        return {
            "student": self.student.state_dict(), "averaged": self.averaged.state_dict(),
            "adapters": self.adapters.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "epoch": self.epoch, "best": self.best,
            "since_best": self.since_best, "history": self.history,
            "settings": settings_of(self.args),
        }  # fmt: skip

    def load_state_dict(self, state):
        """Continue from what `state_dict` gave, on this device or another."""
        for group in state["optimizer"]["param_groups"]:  # the kernel of this device, not of that
            group["fused"] = self.optimizer.defaults["fused"]
        for name in ("student", "averaged", "adapters", "optimizer", "scaler"):
            if state[name] or name != "scaler":  # empty where the last device needed no scaling
                getattr(self, name).load_state_dict(state[name])
        for name in ("epoch", "best", "since_best", "history"):
            setattr(self, name, state[name])
        self.saved = self.epoch
        # The moments came in the memory format of the other device.
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)


def read_init(args, files, resumed):
    """The weights of `--init`, if they may be used, and a short key of the file.

    A run that continues has weights of its own, and does not need the file any more.
    """
    if resumed and resumed["epoch"]:
        return None, resumed["settings"].get("init_digest")
    path = Path(args.init)
    given, checkpoint = kd_losses.load_student(path)
    settings = checkpoint.get("settings", {})
    if checkpoint.get("num_classes") != voc_data.NUM_CLASSES or not isinstance(settings, dict):
        raise DataError(f"--init {path} is not a student for the classes of VOC")
    if checkpoint["model"] != args.model:
        raise UsageError(f"--init {path} holds {checkpoint['model']}, not {args.model}")
    if same_path(path, files.best):
        raise UsageError(f"--init {path} would be overwritten by this run: name another --save_dir")
    other_val = settings.get("val_split", args.val_split) != args.val_split
    if (other_val or settings.get("allow_val_in_train")) and not args.allow_val_in_train:
        raise UsageError(
            f"--init {path} was trained with --allow_val_in_train, or validated on another list: "
            "it may know the images of this report. Allow that with --allow_val_in_train"
        )
    return given.state_dict(), hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def build_student(args, init):
    """The student at the start of a run: ImageNet, random or given weights; some parts frozen."""
    student = kd_losses.STUDENTS[args.model](pretrained=not (args.no_pretrained or init))
    if init:
        student.load_state_dict(init)
    for part in frozen_parts(student, args.freeze):
        part.requires_grad_(False)
    return student


def frozen_parts(student, freeze):
    """The parts of the backbone that `--freeze` keeps as they are."""
    return [getattr(student.backbone, f"to_{level}") for level in FROZEN_LEVELS[freeze]]


def build_optimizer(args, student, adapters):
    """AdamW or SGD over four groups: backbone at a lower rate, norms and biases without decay."""
    named = [*student.named_parameters(), *adapters.named_parameters()]
    groups = []
    backbone_factor = 1.0 if args.no_pretrained else args.backbone_lr_factor
    for in_backbone, factor in ((True, backbone_factor), (False, 1.0)):
        for is_weight in (True, False):
            chosen = [
                parameter for name, parameter in named
                if name.startswith("backbone.") == in_backbone
                and (parameter.ndim > 1) == is_weight and parameter.requires_grad
            ]  # fmt: skip
            decay = args.weight_decay if is_weight else 0.0
            groups.append({"params": chosen, "lr": args.lr * factor, "weight_decay": decay})
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, fused=named[0][1].device.type != "mps")


def choose_amp(name, device):
    """The dtype of mixed precision, or None for none."""
    if name == "auto":
        if device.type != "cuda":
            return None
        natively = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if natively else torch.float16
    if name == "float16" and device.type != "cuda":
        raise UsageError("--amp float16 needs a CUDA device; bfloat16 and off run anywhere")
    return {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


# --------------------------------------------------------------------------------------- files


class RunFiles:
    """The paths a run writes."""

    def __init__(self, folder, run):
        self.folder, self.run = folder, run
        self.best, self.last = folder / f"best_model_{run}.pth", folder / f"last_{run}.pth"
        self.report = folder / f"training_report_{run}.txt"
        self.curves = folder / f"training_curves_{run}.png"
        self.history = folder / f"history_{run}.jsonl"

    def kept(self, epoch):
        """The copy that is kept of an epoch."""
        return self.folder / f"epoch_{epoch}_{self.run}.pth"


def save_epoch(args, trainer, files):
    """Write what an epoch leaves.

    `last` comes after `best`: a run killed between the two repeats the epoch, and writes the same.
    In the first epoch there is no `last` yet, so one that says "nothing done yet" goes before.
    """
    if trainer.epoch == 1:
        if files.last.is_file() and kd_losses.read_checkpoint(files.last).get("epoch"):
            raise DataError(
                f"{files.last} was not there when this run began, and holds another: it is left as "
                "it is. The same command again goes on with that; or name another --save_dir"
            )
        save_whole(nothing_done(args), files.last)
    if trainer.best["epoch"] == trainer.epoch:
        save_whole(trainer.shipped(), files.best)
    if trainer.epoch % args.checkpoint_interval == 0:
        save_whole(trainer.shipped(), files.kept(trainer.epoch))
        write_summary(args, trainer, files)
    lines = "".join(json.dumps(line) + "\n" for line in trainer.history)
    write_whole(lines.encode(), files.history)
    save_whole(trainer.state_dict(), files.last)


def save_patiently(args, trainer, files):
    """`save_epoch`, again after a while: network drives and virus scanners refuse a write at times.

    A disk that is full, or may not be written, stays so: that is raised at once.
    """
    for wait in (*SAVE_AGAIN_AFTER, None):
        try:
            return save_epoch(args, trainer, files)
        except OSError as error:
            reason = getattr(error.__cause__, "errno", None)
            if wait is None or reason in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                raise
            print(f"{error}; trying again in {wait} s", flush=True)
            time.sleep(wait)


def save_whole(content, path):
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(buffer.getbuffer(), path)


def epoch_line(args, history):
    """The line that is printed after an epoch."""
    record = history[-1]
    parts = [
        f"epoch {record['epoch']}/{args.epochs}",
        f"loss {record['loss']:.3f} (ce {record['ce']:.3f} kd {record['kd']:.3f})",
    ]
    if "val_miou" in record:
        parts.append(f"val loss {record['val_loss']:.3f} mIoU {record['val_miou']:.3f}")
    parts.append(f"{record['images_per_second']:.0f} img/s")
    left = time_left(args, history)
    parts.append(f"{epoch_seconds(record):.0f} s, {left / 60:.0f} min left")
    return " | ".join(parts)


def epoch_seconds(record):
    """What an epoch took, its validation included."""
    return record["seconds"] + record.get("val_seconds", 0)


def time_left(args, history):
    """Seconds to the end: as the last epochs took, for as many pixels as the others have."""
    recent = history[-max(3, args.val_every) :]
    pixels = [crop_of_epoch(args, epoch) ** 2 for epoch in range(args.epochs)]  # of a crop
    seen = sum(pixels[record["epoch"] - 1] for record in recent)
    return sum(map(epoch_seconds, recent)) / seen * sum(pixels[history[-1]["epoch"] :])


def summarise_data(root, train_items, val_items):
    """How many images there are, for people: {"root", "train", "unlabelled", "val"}."""
    unlabelled = sum(item.mask is None for item in train_items)
    return {
        "root": root.name, "train": len(train_items) - unlabelled, "unlabelled": unlabelled,
        "val": len(val_items),
    }  # fmt: skip


def describe_run(args, root, trainer):
    """Say what is about to happen."""
    data = args.data_summary
    extra = f" and {data['unlabelled']} without ground truth" if data["unlabelled"] else ""
    teacher = f", taught by {trainer.teacher.name}" if trainer.teacher else ""
    continued = f"; continuing after epoch {trainer.epoch}" if trainer.epoch else ""
    say(args, f"VOC 2012 at {root}: {data['train']} training images of "
              f"'{args.train_split}'{extra}, {data['val']} of '{args.val_split}'")  # fmt: skip
    say(args, f"{args.model} ({trainer.parameters:,} parameters), kd_mode {args.kd_mode}{teacher}, "
              f"on {hardware(args)}{continued}")  # fmt: skip


def hardware(args):
    """The devices of a run, for people."""
    name = voc_data.device_name(args.torch_device)
    return name if args.world_size == 1 else f"{args.world_size} x {name}"


def write_summary(args, trainer, files):
    """Write the report and the curves of the epochs so far."""
    write_whole(training_report(args, trainer).encode(), files.report)
    write_figure(training_curves(trainer.history, files.run), files.curves)


def training_report(args, trainer):
    """The text of training_report_*.txt."""
    history, best, data = trainer.history, trainer.best, args.data_summary
    validated = [record for record in history if "val_miou" in record]
    seconds = [record["seconds"] for record in history]
    images = sum(record["images"] for record in history)
    lines = [
        f"Training report: {args.model}, kd_mode {args.kd_mode}",
        "",
        "Result",
        f"  best val mIoU            {best['miou']:.4f} (epoch {best['epoch']})",
        f"  final val mIoU           {validated[-1]['val_miou'] if validated else math.nan:.4f}",
        f"  parameters               {trainer.parameters:,}",
        f"  score                    {trainer.score(best['miou']):.4f}  "
        "= 4 * mIoU / (1 + parameters in millions)",
        f"  epochs                   {len(history)} of {args.epochs}",
        "",
        "Data",
        f"  folder                   {data['root']}",
        f"  training images          {data['train']} ('{args.train_split}')",
        f"  without ground truth     {data['unlabelled']}",
        f"  validation images        {data['val']} ('{args.val_split}')",
        "",
        "Time",
        f"  device                   {hardware(args)}, torch {torch.__version__}",
        f"  training, all epochs     {sum(seconds):.0f} s",
        f"  training, per epoch      {sum(seconds) / len(seconds):.1f} s",
        f"  training, per image      {1000 * sum(seconds) / images:.2f} ms",
        f"  validation, per epoch    "
        f"{sum(r['val_seconds'] for r in validated) / max(1, len(validated)):.1f} s",
        "",
        "Settings",
        *(f"  {name:<24} {value}" for name, value in sorted(settings_of(args).items())),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def training_curves(history, title):
    """A figure: losses by epoch on the left, val mIoU on the right."""
    epochs = [record["epoch"] for record in history]
    validated = [record for record in history if "val_miou" in record]
    val_epochs = [record["epoch"] for record in validated]
    figure, (left, right) = voc_data.pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(epochs, [record["loss"] for record in history], label="train loss")
    if any(record["kd"] for record in history):
        ce = [record["ce"] for record in history]
        left.plot(epochs, ce, "--", label="train cross-entropy (class weights)")
    val_losses = [record["val_loss"] for record in validated]
    left.plot(val_epochs, val_losses, marker=".", label="val cross-entropy (plain)")
    left.set(xlabel="epoch", ylabel="loss", title=title)
    left.legend()
    mious = [record["val_miou"] for record in validated]
    right.plot(val_epochs, mious, marker=".", color="tab:green")
    right.set(xlabel="epoch", ylabel="val mIoU", title="mIoU on the validation split")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    voc_data.run_script(main, get_args_parser().parse_args())
