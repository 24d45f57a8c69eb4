"""What train.py says of the cost of a step: of this kind of network, images and device, or nothing."""

import pytest
import torch

from training import cost
from training.cost import expected_cost

CPU_FILE = """row,variant,ms,kept_mb,peak_mb
"resnet20, eager",plain,100,1,
"resnet20, eager",exact,260,1,
"resnet20, eager",online,140,1,
"resnet20, eager",linear,110,1,
"resnet20, compiled",plain,80,1,
"resnet20, compiled",exact,184,1,
"resnet18, 224x224, batch 64",plain,9000,1,
"resnet18, 224x224, batch 64",exact,27900,1,
"""
GPU_FILE = """network and batch,variant,gpu,launch_us,operators,gb,tflop,modelled_ms,modelled_ratio
"resnet18, 64 images",plain,H100 TF32,0,1,1,1,9,1
"resnet18, 64 images",exact,H100 TF32,0,1,1,1,27,3
"resnet18, 64 images",plain,H100 TF32,5,1,1,1,10,1
"resnet18, 64 images",exact,H100 TF32,5,1,1,1,35,3.5
"resnet18, 64 images",plain,H100 bf16,5,1,1,1,10,1
"resnet18, 64 images",exact,H100 bf16,5,1,1,1,43,4.3
"resnet18, 256 images",plain,L4 TF32,5,1,1,1,10,1
"resnet18, 256 images",exact,L4 TF32,5,1,1,1,31,3.1
"resnet18, 64 images",plain,V100 float32,5,1,1,1,10,1
"resnet18, 64 images",exact,V100 float32,5,1,1,1,24,2.4
"""
MEASURED_FILE = """network,batch,precision,way,variant,ms,ratio,kernels,peak_mb
resnet18,64,TF32,eager,plain,10,1,,
resnet18,64,TF32,eager,exact,82,8.2,,
resnet18,64,TF32,graph,plain,10,1,,
resnet18,64,TF32,graph,exact,29,2.9,,
resnet18,256,TF32,eager,plain,10,1,,
resnet18,256,TF32,eager,exact,61,6.1,,
"""
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _numbers(tmp_path, monkeypatch):
    (tmp_path / "step_time_torch2_cpu_2threads.csv").write_text(CPU_FILE)
    (tmp_path / "gpu_model.csv").write_text(GPU_FILE)
    monkeypatch.setattr(cost, "RESULTS", tmp_path)


@pytest.mark.parametrize(("overrides", "size", "found"), [
    (("model=resnet20_dbb",), 32, "2.6 times the plain resnet20's time (measured on another CPU"),
    (("model=resnet20", "block=dbb_online"), 8, "1.4 times"),
    (("model=resnet20", "block=orepa"), 32, "1.1 times"),
    (("model=resnet20_dbb", "model.compile=true"), 32, "2.3 times"),
    (("model=resnet18_dbb",), 224, "3.1 times"),
    (("model=resnet18_dbb", "model.compile=true"), 224, None),
    (("model=resnet20_dbb",), 96, None),
    (("model=resnet20", "block=acb"), 32, None),
    (("model=resnet20_dbb", "block.branches=[kxk]"), 32, None),
    (("model=resnet34", "block=dbb"), 32, None)])
def test_on_a_cpu(make_settings, overrides, size, found):
    said = expected_cost(make_settings(*overrides), size, torch.device("cpu"))
    assert (said is None) if found is None else (found in said)


@pytest.mark.parametrize(("gpu", "overrides", "found"), [
    (H100, (), "3.5 times the plain resnet18's time (by a model of this GPU"),
    (H100, ("trainer.precision=bf16-mixed",), "4.3 times"),
    ("Tesla V100-SXM2-16GB", (), "2.4 times"),
    ("NVIDIA L4", ("data.batch_size=512",), "3.1 times"),
    ("NVIDIA L40S", (), None),
    (H100, ("model.compile=true",), None),
    (H100, ("model=resnet34",), None)])
def test_on_a_gpu(make_settings, monkeypatch, gpu, overrides, found):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    settings = make_settings("model=resnet18", "block=dbb", "data.batch_size=64", *overrides)
    said = expected_cost(settings, 224, torch.device("cuda"))
    assert (said is None) if found is None else (found in said)
    assert expected_cost(settings, 32, torch.device("cuda")) is None


@pytest.mark.parametrize(("overrides", "found"), [
    ((), "8.2 times the plain resnet18's time (measured on such a GPU"),
    (("data.batch_size=200",), "6.1 times"),
    (("trainer.precision=bf16-mixed",), "4.3 times the plain resnet18's time (by a model"),
    (("model.compile=reduce-overhead",), None)])
def test_what_was_measured_comes_before_the_model(make_settings, monkeypatch, tmp_path, overrides, found):
    (tmp_path / "gpu_time_NVIDIA_H100_PCIe.csv").write_text(MEASURED_FILE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    settings = make_settings("model=resnet18", "block=dbb", "data.batch_size=64", *overrides)
    said = expected_cost(settings, 224, torch.device("cuda"))
    assert (said is None) if found is None else (found in said)


def test_what_was_run_elsewhere_breaks_nothing(make_settings, tmp_path):
    """Another file of the benchmark, or none; a device that is neither a CPU nor CUDA's."""
    settings = make_settings("model=resnet20_dbb")
    assert expected_cost(settings, 32, torch.device("mps")) is None
    (tmp_path / "step_time_torch3_cpu_8threads.csv").write_text(CPU_FILE.replace(",260,", ",240,"))
    assert "2.4 times" in expected_cost(settings, 32, torch.device("cpu"))
    for path in tmp_path.glob("step_time_*"):
        path.unlink()
    assert expected_cost(settings, 32, torch.device("cpu")) is None
