"""Train a compact student on PASCAL VOC 2012, alone or distilled from a frozen teacher.

    python train.py --model ultracompact --kd_mode none --save_dir runs/voc
    python train.py --model ultracompact --kd_mode response --extra_images voc --save_dir runs/voc

Leaves in --save_dir, RUN being {model}_{kd_mode}: best_model_RUN.pth (the weights with the best
val mIoU), last_RUN.pth (for a resume), history_RUN.jsonl, training_report_RUN.txt and
training_curves_RUN.png. The same command again resumes a run that was cut off.
"""

import argparse
import copy
import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # before matplotlib: a notebook's may not exist in this Python
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import kd_losses
import voc_data
from voc_data import DataError, UsageError, atomic_save, in_range, path

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # all three are set by torchrun
EMA_DECAY = 0.998
WARMUP = 100  # steps
BACKBONE_LR = 0.3  # of a pretrained backbone, times --lr


def get_args_parser():
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=defaults)
    flag, count, real = parser.add_argument, in_range(1), in_range(0, kind=float)
    flag("--model", choices=kd_losses.STUDENTS, default="ultracompact")
    flag("--kd_mode", choices=kd_losses.KD_MODES, default="none")
    flag("--epochs", type=count, default=200, help="passes over the labelled images")
    flag("--batch_size", type=count, default=16, help="labelled images per step and process")
    flag("--lr", type=real, default=3e-3, help="highest learning rate")
    flag("--weight_decay", type=real, default=0.01, help="of weights, not of norms and biases")
    flag("--seed", type=in_range(0), default=0)
    flag("--temperature", type=in_range(0.01, kind=float), default=1.0, help="T of response mode")
    flag("--alpha", type=real, default=1.0, help="weight of the cross-entropy")
    flag("--beta", type=real, help="of the distillation (None: 3 for response, 50 for feature)")
    flag("--kd_levels", nargs="+", choices=kd_losses.LEVELS, default=["high"])
    flag("--class_balance", type=real, default=0.35, metavar="P", help="power of class weights")
    flag("--teacher", type=os.path.expanduser, default="fcn_resnet50", help="or a .pth, .pt2 file")
    flag("--teacher_weights", type=path, metavar="FILE", help="weights of --teacher on disk")
    flag("--extra_images", type=path, nargs="+", default=[], metavar="DIR", help="unlabelled "
         "images for distillation; 'voc': those of the VOC tree in neither list")  # fmt: skip
    flag("--train_split", default="train", help="list in ImageSets/Segmentation")
    voc_data.add_data_flags(flag)
    flag("--allow_val_in_train", action="store_true", help="train on images of the val list")
    flag("--cache_dir", type=path, default="cache", help="'none': no cache, a live teacher")
    flag("--crop_size", type=in_range(33), default=256, help="side of a training crop in px")
    flag("--eval_size", type=in_range(33), default=320, help="longest side in validation in px")
    flag("--scale", type=in_range(0.01, kind=float), nargs=2, default=[0.7, 2.0],
         help="random scale of training images, longest side over --eval_size")  # fmt: skip
    flag("--colour_jitter", type=in_range(0, 1, float), default=0.3, help="strength, 0..1")
    flag("--no_pretrained", action="store_true", help="start from random weights")
    flag("--init", type=path, metavar="FILE", help="start from the weights of a checkpoint")
    flag("--amp", choices=("auto", "off"), default="auto", help="mixed precision on CUDA")
    flag("--compile", action="store_true", help="torch.compile of the student and the losses")
    flag("--save_dir", type=path, default="checkpoints")
    flag("--resume", choices=("auto", "none"), default="auto", help="auto: from last_*.pth")
    flag("--overwrite", action="store_true", help="a fresh start may replace older results")
    flag("--val_every", type=count, default=1, help="epochs between validations")
    flag("--patience", type=in_range(0), default=0, help="validations without a better mIoU "
         "after which to stop; 0: never")  # fmt: skip
    return parser


def main(args):
    check_flags(args)
    device = init_processes(args)
    if LOCAL_RANK > 0:
        dist.barrier()  # the first process of a machine downloads and fills the caches
    train_images, val_images = load_data(args)
    state = load_last(args, run_settings(args, train_images, val_images))
    teacher = None
    if args.kd_mode != "none":
        teacher = kd_losses.load_teacher(args.teacher, args.teacher_weights, device)
    loader = build_loader(args, train_images, teacher, device)
    weights = kd_losses.class_weights(train_images.class_pixels(), args.class_balance).to(device)
    torch.manual_seed(args.seed)  # one seed: the same start in all modes
    model = build_model(args, teacher).to(device, memory_format=torch.channels_last)
    if LOCAL_RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    ema, optimizer = EMA(model.student), build_optimizer(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(args, device) == torch.float16)
    parts = {"model": model, "ema": ema.network, "optimizer": optimizer, "scaler": scaler}
    history, settings = state["history"], state["settings"]
    for name in [name for name in parts if history and state[name]]:  # an unused scaler's is empty
        parts[name].load_state_dict(state[name])
    if args.compile:
        model.compile(fullgraph=True)
    network = DistributedDataParallel(model, broadcast_buffers=False) if WORLD_SIZE > 1 else model
    if RANK == 0:
        start_run(args, state, device)

    try:
        while len(history) < args.epochs and not out_of_patience(args, history):
            epoch = len(history)
            arguments = args, epoch, network, loader, teacher, weights, optimizer, scaler, ema
            record = train_one_epoch(*arguments)
            if (epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs:
                record |= validate(args, ema.network, val_images, device)
            history.append(record)
            if RANK == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                save_epoch(args, state | {"history": history, "settings": settings})
                print(epoch_line(args, history), flush=True)
    except (KeyboardInterrupt, SystemExit):
        if RANK == 0:
            print(f"\nstopped in epoch {len(history) + 1}: with --resume auto it goes on there")
        raise
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = kd_losses.first_line(error)
        raise UsageError(f"--compile does not work here ({reason}): leave it out") from error
    if RANK == 0 and best_epoch(history):
        write_summary(args, history, settings)
        print(report(history, settings).partition("\n\nSettings")[0])
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- one epoch, the losses

def train_one_epoch(args, epoch, network, loader, teacher, weights, optimizer, scaler, ema):
    """One pass over the labelled images; returns a line of the history with the mean losses."""
    start, device, half = time.perf_counter(), weights.device, amp_dtype(args, weights.device)
    torch.manual_seed(args.seed * 1_000_003 + epoch * 1_009 + RANK)  # of dropout
    loader.batch_sampler.epoch = epoch
    network.train()
    criterion = torch.compile(compute_losses, fullgraph=True) if args.compile else compute_losses
    totals = torch.zeros(3, device=device)
    progress = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", leave=False, unit="step",
                    disable=None if RANK == 0 else True)  # fmt: skip
    for step, batch in enumerate(progress):
        done = epoch * len(loader) + step
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(done, args.epochs * len(loader))
        batch = {k: v.to(device, non_blocking=device.type == "cuda") for k, v in batch.items()}
        images = voc_data.normalise(batch["image"], batch["jitter"])  # (N, 3, H, W)
        with torch.autocast(device.type, half, enabled=half is not None):
            targets = teacher(images) if teacher and args.cache_dir is None else batch
            logits, features = network(images)  # (N, 21, H/4, W/4), {level: (N, C, h, w)}
        losses = criterion(args, logits, features, batch["mask"], targets, weights)
        optimizer.zero_grad()
        scaler.scale(losses["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update(done)
        totals += torch.stack(list(losses.values())).detach()
        if step % 20 == 19 or step + 1 == len(loader):  # rarely: the host waits for the device
            loss = totals[0].item() / (step + 1)
            progress.set_postfix(loss=f"{loss:.3f}")
            if not math.isfinite(loss):
                raise DataError(f"the loss is {loss} in epoch {epoch + 1}, of which nothing was "
                                "saved: choose a lower --lr or --amp off")  # fmt: skip
    if dist.is_initialized():  # losses and BatchNorm statistics become their means
        for tensor in [totals, *network.buffers(), *ema.network.buffers()]:
            if tensor.is_floating_point():
                dist.all_reduce(tensor)
                tensor /= WORLD_SIZE
    loss, ce, kd = (totals / len(loader)).tolist()
    return {"epoch": epoch + 1, "loss": loss, "ce": ce, "kd": kd,
            "lr": optimizer.param_groups[-1]["lr"], "seconds": time.perf_counter() - start,
            "images": len(loader) * args.batch_size * WORLD_SIZE}  # fmt: skip


def compute_losses(args, logits, features, labels, targets, weights):
    """The criterion of the mode, {"loss", "ce", "kd"}: float32 scalars.

    Args:
        logits: (N, 21, h, w), at the student's own stride 4. features: {level: (N, C, h, w)},
            adapted. labels: (N, H, W) uint8. weights: (21,), of the classes.
        targets: the teacher's "out" in response mode, its features in feature mode.
    """
    ce = kd_losses.cross_entropy(logits, labels, weights)
    kd = torch.zeros_like(ce)
    if args.kd_mode == "response":
        teacher = targets["out"]
        kd = kd_losses.response_based_kd_loss(logits, teacher, labels, weights, args.temperature)
    elif args.kd_mode == "feature":
        kd = kd_losses.feature_based_kd_loss(features, targets, labels)
    return {"loss": args.alpha * ce + args.beta * kd, "ce": ce, "kd": kd}


def schedule(step, total):
    """Factor on the learning rate: linear warm-up, then DeepLab's polynomial down to 0."""
    return min(1.0, (step + 1) / WARMUP) * (1 - step / total) ** 0.9


def amp_dtype(args, device):
    """The dtype of mixed precision; None: float32."""
    if args.amp == "off" or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16


def validate(args, network, images, device):
    start = time.perf_counter()
    matrix, loss = voc_data.evaluate(network, images, args.eval_size, device, args.workers)
    return {"val_loss": loss, "val_miou": matrix.miou, "val_pixel_accuracy": matrix.pixel_accuracy,
            "val_seconds": time.perf_counter() - start}  # fmt: skip


# ---------------------------------------------------------------------- data, network and optimizer

def check_flags(args):
    """Refuse flags that cannot work together, and fill in what depends on others."""
    if args.scale[0] > args.scale[1]:
        raise UsageError("--scale takes the smaller factor first")
    if args.extra_images and args.kd_mode == "none":
        raise UsageError("--extra_images are for distillation: --kd_mode none cannot use them")
    if args.beta is None:
        args.beta = {"none": 0.0, "response": 3.0, "feature": 50.0}[args.kd_mode]
    if str(args.cache_dir) == "none":
        args.cache_dir = None


def init_processes(args):
    """The device of this process, which joins the others if torchrun started several."""
    if torch.cuda.is_available() and args.device != "cpu":
        if LOCAL_RANK >= torch.cuda.device_count():
            raise UsageError(f"one process a GPU: --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD_SIZE > 1:
        wait = timedelta(hours=2)  # while one of them downloads and fills the caches
        backend = "gloo" if args.device == "cpu" else None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # keeps restarts apart
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://", timeout=wait))[0])
        dist.init_process_group(backend, None, wait, WORLD_SIZE, RANK, store)
    return voc_data.choose_device(args.device)


def load_data(args):
    """Training images, labelled ones first, and val images, as VOCDatasets."""
    root = voc_data.find_voc(args.data_root)
    labelled = voc_data.list_items(root, args.train_split)
    val = voc_data.list_items(root, args.val_split)
    train_ids, val_ids = ({item.id for item in items} for items in (labelled, val))
    if train_ids & val_ids and not args.allow_val_in_train:
        raise UsageError(f"{len(train_ids & val_ids)} images of --train_split are in --val_split "
                         "too: choose other lists, or add --allow_val_in_train")  # fmt: skip
    unlabelled = voc_data.list_extra_images(args.extra_images, root, train_ids | val_ids)
    lists = labelled + unlabelled, val
    train, val = (voc_data.VOCDataset(items, args.cache_dir, args.workers) for items in lists)
    val.class_pixels()  # masks without classes are found before the training
    return train, val


def build_loader(args, images, teacher, device):
    """Batches of crops: "image", "mask", "jitter", and by key the teacher's cached maps."""
    maps = {}
    if teacher:
        keys = ["out"] if args.kd_mode == "response" else args.kd_levels
        missing = [key for key in keys if key not in teacher.channels]
        if missing:
            raise UsageError(f"the teacher {teacher.name} has no features {missing}: use another "
                             "--teacher or --kd_mode response")  # fmt: skip
        if args.cache_dir:
            files = [Path(f) for f in (args.teacher, args.teacher_weights) if f]
            source = [(f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
            maps = teacher.cached_maps(images, keys, args.cache_dir, source)
    crop = {"size": args.crop_size, "longest": args.eval_size, "scale": args.scale,
            "seen": teacher.size if teacher else 0}  # fmt: skip
    dataset = voc_data.TrainDataset(images, crop, args.colour_jitter, maps)
    labelled = sum(item.mask is not None for item in images.items)
    counts = labelled, len(images) - labelled
    sampler = voc_data.TrainSampler(*counts, args.batch_size, args.seed, RANK, WORLD_SIZE)
    on_cuda = device.type == "cuda"
    return voc_data.make_loader(dataset, args.workers, 1, batch_sampler=sampler, pin_memory=on_cuda)


class StudentWithAdapters(nn.Module):
    """Images (N, 3, H, W) -> logits (N, 21, H/4, W/4), {level: adapted features}."""

    def __init__(self, student, adapters):
        super().__init__()
        self.student, self.adapters = student, adapters

    def forward(self, images):
        logits, features = self.student(images, return_features=True, upsample=False)
        return logits, {level: adapt(features[level]) for level, adapt in self.adapters.items()}


def build_model(args, teacher):
    """The student, from ImageNet, random or given weights, with its adapters."""
    student = kd_losses.STUDENTS[args.model](pretrained=not (args.no_pretrained or args.init))
    if args.init:
        weights = kd_losses.load_student(args.init)[0].state_dict()
        kd_losses.load_weights(student, weights, args.init)
    levels = args.kd_levels if args.kd_mode == "feature" else []
    channels = teacher.channels if teacher else {}
    adapters = kd_losses.make_adapters(student.feature_channels, channels, levels)
    return StudentWithAdapters(student, adapters)


def build_optimizer(args, model):
    """AdamW: a pretrained backbone at a lower rate, no weight decay on norms and biases."""
    groups = {}
    for name, parameter in model.named_parameters():
        slow = name.startswith("student.backbone.") and (args.init or not args.no_pretrained)
        key = args.lr * (BACKBONE_LR if slow else 1), args.weight_decay * (parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    groups = [{"params": parameters, "initial_lr": rate, "weight_decay": decay}
              for (rate, decay), parameters in groups.items()]  # fmt: skip
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


class EMA:
    """Exponential moving average of a network's weights and BatchNorm statistics."""

    def __init__(self, network):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        states = self.network.state_dict().values(), network.state_dict().values()
        self.averaged, self.current = ([t for t in s if t.is_floating_point()] for s in states)

    @torch.no_grad()
    def update(self, step):
        decay = min(EMA_DECAY, (1 + step) / (10 + step))  # follows closely at first
        torch._foreach_lerp_(self.averaged, self.current, 1 - decay)


# ---------------------------------------------------------------------------------- resume and save

MAY_CHANGE = {"resume", "overwrite", "device", "workers", "save_dir", "data_root", "cache_dir",
              "epochs", "patience", "compile"}  # on a resume  # fmt: skip


def run_file(args, kind, suffix="pth"):
    return args.save_dir / f"{kind}_{args.model}_{args.kd_mode}.{suffix}"


def run_settings(args, train_images, val_images):
    """The flags as plain values, paths by their last part, numbers of images and parameters."""
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings["extra_images"] = [folder.name for folder in args.extra_images]
    teacher = f"{Path(args.teacher).name}, {'cached' if args.cache_dir else 'live'}"
    settings["teacher"] = teacher if args.kd_mode != "none" else None
    settings["labelled_images"] = sum(item.mask is not None for item in train_images.items)
    settings["unlabelled_images"] = len(train_images) - settings["labelled_images"]
    count = kd_losses.count_parameters(kd_losses.STUDENTS[args.model](pretrained=False))
    return settings | {"val_images": len(val_images), "processes": WORLD_SIZE, "parameters": count}


def load_last(args, settings):
    """The state in last_*.pth, empty for a fresh start, which may not replace results unasked."""
    last, best = run_file(args, "last"), run_file(args, "best_model")
    if args.resume == "auto" and last.exists():
        state = kd_losses.read_checkpoint(last)
        before = state.get("settings") if isinstance(state, dict) else None
        if not isinstance(before, dict) or "history" not in state:
            raise DataError(f"{last} is no last_*.pth of this version of train.py: move it away")
        if len(state["history"]) > args.epochs:
            raise UsageError(f"{last} has {len(state['history'])} epochs, more than --epochs")
        changed = [name for name in sorted((settings.keys() | before.keys()) - MAY_CHANGE)
                   if settings.get(name) != before.get(name)]  # fmt: skip
        if changed and state["history"]:
            was = ", ".join(f"{name} {before.get(name)}" for name in changed)
            raise UsageError(f"{last} was made with {was}: use that again, another --save_dir, or "
                             "--resume none --overwrite for a fresh start")  # fmt: skip
        return state | {"settings": settings}
    older = [file for file in (best, last) if file.exists()]
    if older and not args.overwrite:
        raise UsageError(f"{older[0]} exists: choose another --save_dir, or add --overwrite")
    return {"history": [], "settings": settings}


def start_run(args, state, device):
    """Print what is about to happen; bring the files in line with what is resumed."""
    history, settings = state["history"], state["settings"]
    print(f"{args.model}, {settings['parameters']:,} parameters, on {device.type}, kd_mode "
          f"{args.kd_mode}, teacher {settings['teacher']}: {settings['labelled_images']} labelled "
          f"images, {settings['unlabelled_images']} unlabelled, {settings['val_images']} val; "
          f"{len(history)} of {args.epochs} epochs are done", flush=True)
    if not history:  # no older run's state is left, and one that is killed at once can resume
        atomic_save(run_file(args, "last"), lambda file: torch.save(state, file))
    write_history(args, history)  # a kill may have come between last_*.pth and the history


def best_epoch(history):
    """The line of the history with the best val mIoU, the first of equals; None without any."""
    validated = [record for record in history if "val_miou" in record]
    return max(validated, key=lambda record: record["val_miou"], default=None)


def out_of_patience(args, history):
    """Whether the last --patience validations brought no better mIoU."""
    done = best_epoch(history)["epoch"] if best_epoch(history) else len(history)
    return 0 < args.patience <= sum("val_miou" in record for record in history[done:])


def save_epoch(args, state):
    """Write the best weights, the state, and what is derived from it, in this order: a run that is
    killed before the state is written repeats the epoch, and writes the same again."""
    history, settings = state["history"], state["settings"]
    if best_epoch(history) is history[-1]:
        best = {name: settings[name] for name in ("model", "kd_mode", "eval_size", "parameters")}
        best |= {"model_state_dict": state["ema"], "num_classes": voc_data.NUM_CLASSES,
                 "miou": history[-1]["val_miou"], "epoch": len(history), "settings": settings}
        atomic_save(run_file(args, "best_model"), lambda file: torch.save(best, file))
    atomic_save(run_file(args, "last"), lambda file: torch.save(state, file))
    write_history(args, history)
    if len(history) % 10 == 0 and best_epoch(history):
        write_summary(args, history, settings)


def write_history(args, history):
    atomic_save(run_file(args, "history", "jsonl"), "".join(json.dumps(r) + "\n" for r in history))


# -------------------------------------------------------------------------------- report and curves

def epoch_line(args, history):
    """The line that is printed after an epoch."""
    record = history[-1]
    text = (f"epoch {len(history)}/{args.epochs} | loss {record['loss']:.3f} "
            f"(ce {record['ce']:.3f} kd {record['kd']:.3f})")  # fmt: skip
    if "val_miou" in record:
        text += f" | val loss {record['val_loss']:.3f} mIoU {record['val_miou']:.3f}"
    recent = history[-max(3, args.val_every) :]
    seconds = [record["seconds"] + record.get("val_seconds", 0) for record in recent]
    left = sum(seconds) / len(seconds) * (args.epochs - len(history)) / 60
    speed = record["images"] / record["seconds"]
    return f"{text} | {speed:.0f} img/s | {seconds[-1]:.0f} s, {left:.0f} min left"


def report(history, settings):
    """The text of training_report_*.txt."""
    best, final = best_epoch(history), [r for r in history if "val_miou" in r][-1]
    seconds, images = (sum(record[key] for record in history) for key in ("seconds", "images"))
    score = kd_losses.score(best["val_miou"], settings["parameters"])
    rows = {
        "best val mIoU": f"{best['val_miou']:.4f} (epoch {best['epoch']})",
        "final val mIoU": f"{final['val_miou']:.4f} (epoch {final['epoch']})",
        "score": f"{score:.4f} = 4 * mIoU / (1 + parameters in millions)",
        "time": f"{seconds:.0f} s in {len(history)} epochs, {1000 * seconds / images:.2f} ms a "
                "labelled image, without validation",
    }  # fmt: skip
    title = f"Training report: {settings['model']}, kd_mode {settings['kd_mode']}\n"
    table, flags = ([f"{k:<20} {v}" for k, v in d.items()] for d in (rows, settings))
    return "\n".join([title, *table, "\nSettings", *sorted(flags), ""])


def curves(history):
    """{label: [(epoch, value)]} of what training_curves_*.png shows; mIoU in 0..1."""
    shown = {"train loss": "loss", "train cross-entropy": "ce", "train distillation": "kd",
             "val cross-entropy, unweighted": "val_loss", "val mIoU": "val_miou"}  # fmt: skip
    return {label: [(r["epoch"], r[key]) for r in history if key in r]
            for label, key in shown.items()}  # fmt: skip


def write_summary(args, history, settings):
    """Write the report and the curves of a history with a validation."""
    atomic_save(run_file(args, "training_report", "txt"), report(history, settings))
    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, points in curves(history).items():
        axis = right if "mIoU" in label else left
        axis.plot(*zip(*points), marker=".", label=label)
    for axis in (left, right):
        axis.set(xlabel="epoch", title=f"{args.model} {args.kd_mode}")
        axis.legend()
        axis.grid(alpha=0.3)
    atomic_save(run_file(args, "training_curves", "png"), lambda f: figure.savefig(f, format="png"))


if __name__ == "__main__":
    voc_data.run(main, get_args_parser().parse_args())
