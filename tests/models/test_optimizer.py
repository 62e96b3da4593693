"""Parameter groups by role and the schedule."""

import itertools
import re
from functools import partial

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from running import CONFIGS
from torch import nn

import models  # noqa: F401  registers the models
from models.optimizer import ROLES, build_optimizer, cosine_schedule, parameter_roles
from stl import SettingError, STLLinear

GROUPS = {
    "dense": {"lr_mult": 1.0, "weight_decay": 0.1},
    "encoded": {"lr_mult": 4.0, "weight_decay": 0.2},
    "basis": {"lr_mult": 0.5, "weight_decay": 0.3},
    "bias_norm": {"lr_mult": 2.0, "weight_decay": 0.0},
}


@pytest.fixture
def model():
    return timm.create_model("t2t_vit_tiny", num_classes=10, linear=STLLinear, linear_groups=["backbone"])


def test_every_trainable_parameter_has_one_role(model):
    roles = parameter_roles(model)
    assert set(roles) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {
        "blocks.0.attn.qkv.weight": "encoded",
        "blocks.0.attn.qkv.encoder": "basis",
        "blocks.2.mlp.fc2.decoder": "basis",
        "blocks.0.attn.proj.bias": "bias_norm",
        "blocks.0.norm1.weight": "bias_norm",
        "cls_token": "bias_norm",
        "head.weight": "dense",
        "tokens_to_token.attention1.kqv.weight": "dense",
    }.items() <= roles.items()
    assert "pos_embed" not in roles
    assert "tokens_to_token.attention1.w" not in roles


def test_a_layer_by_itself_has_roles_too():
    assert parameter_roles(STLLinear(8, 8)) == {
        "weight": "encoded",
        "encoder": "basis",
        "decoder": "basis",
        "bias": "bias_norm",
    }


def test_each_role_has_its_own_learning_rate_and_weight_decay(model):
    optimizer = build_optimizer(model, algorithm=partial(torch.optim.AdamW, eps=1e-7), lr=0.01, groups=GROUPS)
    roles = parameter_roles(model)
    assert [group["name"] for group in optimizer.param_groups] == list(ROLES)
    for group in optimizer.param_groups:
        settings = GROUPS[group["name"]]
        assert group["lr"] == pytest.approx(0.01 * settings["lr_mult"])
        assert group["weight_decay"] == settings["weight_decay"]
        assert group["eps"] == 1e-7
        assert len(group["params"]) == list(roles.values()).count(group["name"])


def test_groups_that_do_not_name_the_roles_are_refused(model):
    with pytest.raises(SettingError, match=r"optimizer.groups has \['dense'\]; it needs exactly dense, encoded, basis"):
        build_optimizer(model, algorithm=torch.optim.AdamW, lr=0.01, groups={"dense": GROUPS["dense"]})


@pytest.mark.parametrize("lr", ["abc", 0.0, float("nan")])
def test_a_rate_that_is_no_positive_number_is_refused(model, lr):
    with pytest.raises(SettingError, match=f"^optimizer.lr={lr} must be a positive number$"):
        build_optimizer(model, algorithm=torch.optim.AdamW, lr=lr, groups=GROUPS)


def test_the_schedule_warms_up_falls_as_a_cosine_and_cools_down():
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 4.0}], lr=1)
    schedule = cosine_schedule(
        optimizer, epochs=12, steps_per_epoch=10, warmup_epochs=1, cooldown_epochs=2, warmup_lr=0.1, min_lr=0.01
    )
    rates = []
    for step in range(120):
        schedule.step_update(step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == [0.1, 0.1]
    assert rates[5] == pytest.approx([0.55, 2.05])
    assert rates[50] == pytest.approx([0.505, 2.005])  # half of the cosine's 100 steps
    assert rates[100:] == [[0.01, 0.01]] * 20
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_the_groups_of_t2t_vit_7_stl():
    """Every trainable parameter of the ImageNet row: (weight decay, learning rate as a multiple of optimizer.lr)."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=["experiment=imagenet/t2t_vit_7_stl"])
    model = instantiate(cfg.model, num_classes=1000, img_size=224, linear=instantiate(cfg.linear))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, set] = {}
    for group in instantiate(cfg.optimizer)(model).param_groups:
        for parameter in group["params"]:
            pattern = re.sub(r"blocks\.\d+", "blocks.*", names[parameter])
            found.setdefault(pattern, set()).add((group["weight_decay"], group["lr"] / cfg.optimizer.lr))
    t2t = [f"tokens_to_token.attention{i}" for i in (1, 2)]
    linears = [f"{stage}.{name}" for stage in t2t for name in ("kqv", "proj", "mlp.0", "mlp.2")]
    linears += ["tokens_to_token.project"]
    linears += [f"blocks.*.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    norms = [f"{stage}.{name}" for stage in t2t for name in ("norm1", "norm2")]
    norms += ["blocks.*.norm1", "blocks.*.norm2", "norm"]
    decayed = {f"{name}.weight": {(0.5, 4.0)} for name in linears} | {"head.weight": {(0.03, 1.0)}}
    undecayed = {f"{name}.{part}": {(0.0, 10.0)} for name in linears for part in ("encoder", "decoder")}
    undecayed |= {f"{name}.bias": {(0.0, 1.0)} for name in (*linears, "head") if name != "blocks.*.attn.qkv"}
    undecayed |= {f"{name}.{part}": {(0.0, 1.0)} for name in norms for part in ("weight", "bias")}
    assert found == decayed | undecayed | {"cls_token": {(0.0, 1.0)}}  # of no tokens
