"""Fixtures shared by all tests. Nothing here, and no test, reaches the network."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision import models

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The networks here are tiny: a second thread costs more than it gives, above all on a busy machine.
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(THREADS))

import voc_data  # noqa: E402  (found through the path set above)

FCN_FILE = "fcn_resnet50_coco-1167a1af.pth"
MOBILENET_FILE = "mobilenet_v3_small-047dcff4.pth"


def load_test_script():
    """test.py under another name: `import test` may find the standard library's."""
    spec = importlib.util.spec_from_file_location("project_test_script", ROOT / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Refuse every connection to another machine, so that no test can come to need one."""
    connect = socket.create_connection

    def refuse(address, *args, **kwargs):
        if address[0] not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test tried to reach {address[0]}")
        return connect(address, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", refuse)
        yield


@pytest.fixture(scope="session")
def sample_root():
    """The synthetic sample, where the scripts keep it."""
    return voc_data.make_sample()


@pytest.fixture(scope="session")
def tiny_voc(sample_root, tmp_path_factory):
    """The first 24 train and 8 val images of the sample, as a VOC folder of their own."""
    root = tmp_path_factory.mktemp("tiny") / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir()
    for split, count in (("train", 24), ("val", 8)):
        ids = voc_data.read_split(sample_root, split)[:count]
        for image_id in ids:
            for name in (f"JPEGImages/{image_id}.jpg", f"SegmentationClass/{image_id}.png"):
                shutil.copyfile(sample_root / name, root / name)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root


@pytest.fixture
def run_script(tmp_path):
    """`run_script("train.py", *args, env=None)`: run a script of the project, as a person would.

    In a process of its own, in an empty folder, with a proxy that refuses and no VOC on the disk.
    """

    def run(name, *args, env=None, cwd=None, timeout=120):
        cwd = Path(cwd or tmp_path / "cwd")
        cwd.mkdir(parents=True, exist_ok=True)
        settings = {
            "OMP_NUM_THREADS": THREADS, "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9", "no_proxy": "localhost,127.0.0.1",
            "KAGGLEHUB_CACHE": str(tmp_path / "no_kagglehub"),
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, args)],
            cwd=cwd, env=os.environ | settings | (env or {}), timeout=timeout,
            capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def fake_torch_home(tmp_path_factory):
    """A TORCH_HOME whose cache holds random weights under the names that torchvision looks for.

    Every tensor is random, BatchNorm statistics too, so that one that is not loaded shows.
    """
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    fcn = models.get_model("fcn_resnet50", weights=None, weights_backbone=None, aux_loss=True)
    for network, name in (
        (fcn, FCN_FILE),
        (models.mobilenet_v3_small(weights=None), MOBILENET_FILE),
    ):
        state = network.state_dict()
        for key, value in state.items():
            if key.endswith("num_batches_tracked"):
                value.fill_(3)
            elif value.ndim == 1:  # norms and biases
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        torch.save(state, folder / name)
    yield home
    shutil.rmtree(home)  # pytest would keep these 150 MB for three sessions
