"""What is around the step on a GPU: decoding, feature extraction, k-NN, exports."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.data.test_loader import CROPS, jpeg, loader_of, make_shards, png, steps_of
from tests.gpu.devices import CUDA
from xcit_dino.cli import main
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.gpu_crops import DeviceCropper, EncodedWork
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.loader import slot_shapes
from xcit_dino.data.ring import Ring
from xcit_dino.data.workers import CropWork, Task
from xcit_dino.eval import knn
from xcit_dino.eval.features import feature_blocks, load_features
from xcit_dino.eval.target import pretrained, resolve
from xcit_dino.models.zoo import create_model
from xcit_dino.train.distributed.dist import World


def test_decoded_on_the_device_the_crops_are_the_hosts(device, tmp_path):
    """JPEGs beside PNGs. nvJPEG upsamples chroma otherwise than libjpeg: a few levels, on average
    less than one."""
    index = make_shards(tmp_path / "shards", image=lambda n: (jpeg, png)[n % 2](n))
    expected = steps_of(loader_of(index), 1)[0]
    samples = expected[0]
    arguments = index, open_source(index, LoaderConfig()), Ring(1, slot_shapes(CROPS, len(samples)))
    works = [kind(*arguments, CROPS, 3) for kind in (CropWork, EncodedWork)]
    done, *crops = DeviceCropper(works[0], device)(works[1][Task(0, samples)])
    assert np.array_equal(done.sources, expected[1]) and not done.bad
    for ours, theirs in zip(crops, expected[3:5], strict=True):
        assert ours.device == device and ours.dtype == torch.uint8
        apart = abs(ours.cpu().numpy().astype(int) - theirs)
        assert apart.max() <= (1 if device.type == "cpu" else 40) and apart.mean() < 1


def test_features_are_those_of_the_cpu(device, run_folder):
    """With batches of which the last is smaller."""
    config = run_folder.target(batch_size_per_gpu=20)
    target, context = resolve(config, World(0, 1, device))
    index, network = context.index("val"), pretrained(target)
    found = load_features(network, index, "val", context)
    network.model.cpu()
    with torch.no_grad():
        images, _, numbers = next(iter(context.images(index, np.arange(48), batch_size=48)))
        plain = resolve(config, World(0, 1, torch.device("cpu")))[1]
        want = feature_blocks(network.model, plain.normalize(images))
    assert np.array_equal(numbers, np.arange(48))
    for name, block in want.items():
        np.testing.assert_allclose(found.blocks[name], block, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["cpu", CUDA])
def test_a_search_is_brute_force_and_shares_its_scratch_memory(kind, monkeypatch):
    """In two searches, one of them in parts; on a CPU with stand-ins for what FAISS has on GPUs."""
    made = []
    if kind == "cpu":

        class Resources:
            def __init__(self) -> None:
                made.append(self)

            def setTempMemory(self, number: int) -> None:
                self.scratch = number

        monkeypatch.setattr(knn.faiss, "get_num_gpus", lambda: 1, raising=False)
        monkeypatch.setattr(knn.faiss, "StandardGpuResources", Resources, raising=False)
        monkeypatch.setattr(knn.faiss, "index_cpu_to_gpu", lambda r, g, i: i, raising=False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    elif not hasattr(knn.faiss, "StandardGpuResources") or not knn.faiss.get_num_gpus():
        pytest.skip("FAISS is built without GPUs here")
    knn.gpu_resources.cache_clear()
    bank, queries = (np.random.default_rng(n).standard_normal((300, 16)) for n in (0, 1))
    cosines = knn.unit_rows(queries).astype(np.float64) @ knn.unit_rows(bank).T.astype(np.float64)
    want = np.argsort(-cosines, axis=1)[:, :10]
    for rows in (1000, 64):
        monkeypatch.setattr(knn, "BANK_ROWS", rows)
        search = knn.Search(bank.astype(np.float32), gpu=True)
        assert search.gpus == [0]
        similarities, found = search(queries.astype(np.float32), 10)
        np.testing.assert_array_equal(found, want)
        np.testing.assert_allclose(similarities, np.take_along_axis(cosines, want, 1), atol=1e-5)
    assert knn.gpu_resources.cache_info().misses == 1
    assert [each.scratch for each in made] == [knn.SCRATCH_BYTES] * (kind == "cpu")
    knn.gpu_resources.cache_clear()


@pytest.mark.slow
def test_weights_from_the_device_are_exported(device, tmp_path):
    """A file of tensors that lay there, as safetensors and as ONNX."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
    torch.manual_seed(0)
    model = create_model("xcit_pico_6_p8").to(device).eval()
    images = torch.randn(2, 3, 32, 40, device=device)
    with torch.no_grad():
        want = model(images).cpu()
    source = tmp_path / "weights.pth"
    torch.save({"teacher": model.state_dict()}, source)
    for name in ("weights.safetensors", "weights.onnx"):
        assert main(["weights", "export", str(source), "--output", str(tmp_path / name)]) == 0
    other = create_model("xcit_pico_6_p8").eval()
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"))
    session = onnxruntime.InferenceSession(tmp_path / "weights.onnx")
    (graph,) = session.run(None, {"images": images.cpu().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(other(images.cpu()), want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(graph, want, rtol=1e-3, atol=1e-3)
