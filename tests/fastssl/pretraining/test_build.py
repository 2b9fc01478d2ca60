import functools

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.core.distributed import choose_device
from fastssl.core.optimizers import OptimConfig, build_optimizer, match_layout
from fastssl.methods.moco_v3 import MoCoV3
from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from fastssl.models.stochastic_depth import step_keys
from fastssl.pretraining import build
from fastssl.pretraining.run_config import load
from shards.errors import UserError


def test_converted_batch_norms_keep_activations_and_names():
    """PyTorch's own conversion turns timm's BatchNormAct2d into a SyncBatchNorm that no longer applies the activation."""
    backbone = build_backbone(ModelConfig(backbone="mobilenetv3_small_050"), 32)
    method = MoCoV3(backbone, Config(dim=8, hidden_dim=8))
    names = list(method.state_dict())
    acts = [type(m.act) for m in method.modules() if type(m).__name__ == "BatchNormAct2d"]
    assert any(act is not nn.Identity for act in acts)
    build.convert_batch_norm(method)
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert [type(m.act) for m in norms if hasattr(m, "act")] == acts
    assert all(type(m).__name__ == "SyncBatchNormAct" for m in norms if hasattr(m, "act"))
    assert list(method.state_dict()) == names


def test_same_seed_same_weights():
    tiny = ["--model.backbone", "resnet10_w32", "--recipe.size", "16", "--method.hidden-dim", "16"]
    (a, shape), (b, _) = (build.build_method(load(None, tiny), torch.device("cpu")) for _ in range(2))
    assert shape["name"] == "resnet10_w32"
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    c, _ = build.build_method(load(None, [*tiny, "--train.seed", "1"]), torch.device("cpu"))
    assert not torch.equal(a.state_dict()["projector.0.weight"], c.state_dict()["projector.0.weight"])


def test_other_channels_than_the_engines_make_are_refused():
    with pytest.raises(UserError, match=r"model\.channels is 4, but the recipe makes views of 3"):
        build.build_method(load(None, ["--model.channels", "4"]), torch.device("cpu"))


def test_a_queue_must_hold_whole_batches():
    flags = ["--model.backbone", "resnet10_w32", "--recipe.size", "16", "--train.batch", "96"]
    with pytest.raises(
        UserError, match=r"queue is 65536 and train.batch is 96, .*: set --method.queue 65568"
    ):
        build.build_method(load(None, [*flags, "--method.queue", "65536"]), torch.device("cpu"))
    method, _ = build.build_method(load(None, [*flags, "--method.queue", "192"]), torch.device("cpu"))
    assert method.queue is not None
    assert method.queue.keys.shape == (2, 192, 256)


def test_only_the_student_recomputes_its_activations():
    flags = ["--model.backbone", "test_vit", "--recipe.size", "32", "--train.checkpointing", "selective"]
    method, _ = build.build_method(load(None, flags), torch.device("cpu"))
    forwards = [[block.forward for block in part.get_submodule("blocks")] for part in method.backbones()]
    assert [{isinstance(f, functools.partial) for f in part} for part in forwards] == [{True}, {False}]


def test_cuda_without_a_gpu_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("kind", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_compiler_is_looked_for_by_device(monkeypatch, kind, variable):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not build.has_compiler(torch.device(kind))
    monkeypatch.setenv(variable, "some-compiler")
    assert build.has_compiler(torch.device(kind))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the compiler's own look
def test_every_mode_and_size_of_a_block_is_compiled(monkeypatch):
    """The compiler's own limit on graphs would leave some blocks uncompiled, with a warning in the log only."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda part: compiled(part, backend="eager"))
    monkeypatch.setattr(build, "has_compiler", lambda device: True)
    model = ModelConfig(backbone="test_vit", drop_path=0.2)
    method = MoCoV3(build_backbone(model, 32, (16,)), Config(dim=8, hidden_dim=8))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        assert build.compile_blocks(method, torch.device("cpu"))
        for num, side in ((16, 32), (7, 32), (3, 16)):
            with torch.no_grad():
                method.backbone.eval()(torch.rand(num, 3, side, side))
        method.train()
        for num, side in ((4, 32), (6, 16)):
            method.draw_keys = step_keys(0, 0, np.arange(num))
            method([torch.rand(num, 3, side, side) for _ in range(2)]).loss.backward()
        assert 8 < torch._dynamo.config.recompile_limit == build.MAX_GRAPHS
        assert 8 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < build.MAX_GRAPHS


def test_restored_optimiser_state_takes_its_parameters_layout():
    weight = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    optimizer = build_optimizer([weight], OptimConfig())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    average = state["exp_avg"].clone()
    state["exp_avg"] = state["exp_avg"].contiguous()
    assert state["exp_avg"].stride() != weight.stride()
    match_layout(optimizer)
    assert state["exp_avg"].stride() == weight.stride()
    assert torch.equal(state["exp_avg"], average)


def test_the_teacher_skips_no_blocks():
    backbone = build_backbone(ModelConfig(backbone="resnet10_w32", drop_path=0.5), 16)
    method = MoCoV3(backbone, Config(dim=8, hidden_dim=8))

    def rates(part: nn.Module) -> set[float]:
        return {m.drop_prob for m in part.modules() if isinstance(getattr(m, "drop_prob", None), float)}

    assert max(rates(method.backbone)) == 0.5
    assert rates(method.teacher_backbone) == {0.0}
