"""Fixtures shared by all tests. Nothing here, and no test, reaches the network."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torchvision import models

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks here are tiny: a second thread costs more than it gives
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too

import voc_data  # noqa: E402  (found through the path set above)


def load_test_script():
    """The project's test.py as a module: `import test` would find the standard library's."""
    spec = importlib.util.spec_from_file_location("project_test_script", ROOT / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def stop_workers():
    """The loaders of a script live to its end; here, to the end of a test."""
    yield
    voc_data.make_loader.cache_clear()


def refuse_network(event, args):
    """Let no test reach another machine; the address of a socket of this one is a text."""
    if event == "socket.connect" and isinstance(args[1], tuple):
        if args[1][0] not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test tried to reach {args[1][0]}")


sys.addaudithook(refuse_network)
sample_root = pytest.fixture(voc_data.make_sample, scope="session")


@pytest.fixture(scope="session")
def tiny_voc(sample_root, tmp_path_factory):
    """The first 24 train and 8 val images of the sample, as a VOC tree; `voc` is a copy."""
    root = tmp_path_factory.mktemp("tiny") / "VOC2012"
    for split, count in (("train", 24), ("val", 8)):
        items = voc_data.list_items(sample_root, split)[:count]
        for file in [file for item in items for file in (item.image, item.mask)]:
            (root / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, root / file.parent.name / file.name)
        file = root / f"ImageSets/Segmentation/{split}.txt"
        voc_data.atomic_save(file, "".join(f"{item.id}\n" for item in items))
    return root


@pytest.fixture
def voc(tiny_voc, tmp_path):
    return shutil.copytree(tiny_voc, tmp_path / "VOC2012")


@pytest.fixture(scope="session")
def fake_torch_home(tmp_path_factory):
    """A TORCH_HOME of random weights under torchvision's file names; statistics are random too."""
    folder = tmp_path_factory.mktemp("torch_home") / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    fcn = models.get_model("fcn_resnet50", weights_backbone=None, aux_loss=True)
    small = models.get_model("mobilenet_v3_small")
    for name, net in (("fcn_resnet50_coco-1167a1af", fcn), ("mobilenet_v3_small-047dcff4", small)):
        for value in net.state_dict().values():
            if value.ndim < 2:  # of norms, and biases; integers: num_batches_tracked
                value.uniform_(0.5, 1.5) if value.is_floating_point() else value.fill_(3)
        torch.save(net.state_dict(), folder / f"{name}.pth")
    yield folder.parent.parent
    shutil.rmtree(folder)  # pytest would keep these 150 MB for three sessions
