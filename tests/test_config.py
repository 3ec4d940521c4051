"""Settings: every value is checked, contradictions are refused, presets are the published ones."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest

from clusterq.config import (
    ClusterQConfig,
    FinetuneConfig,
    QuantizationConfig,
    SynthesisConfig,
    preset,
)
from clusterq.settings import describe, override

PRESETS = ["default", "paper", "gdfq"]

BAD = {
    QuantizationConfig: {
        "weight_bits": [1, 9, 4.0, True, "4", None],
        "activation_bits": [1, 9, 4.0],
        "first_layer_bits": [1, 8.0, False],
        "last_layer_bits": [9, "8"],
        "layer_bits": [{"fc": 1}, {"fc": 8.0}, {"fc": True}, {3: 8}, ["fc"], None],
        "weight_range": ["ema", "MSE", None, ["mse"]],
        "activation_range": ["max"],
        "learned_scale": [1, None, "true"],
        "gradient": ["none"],
        "weight_symmetric": [0],
        "activation_symmetric": [0],
        "int8_symmetric": [1, None],
        "correct_batch_norm": [1, "yes"],
        "range_momentum": [1.0, -0.1, float("nan"), "0.9", True],
        "range_steps": [-1, 2.5],
        "scheme": ["integer", None, True],
        "input_bits": [1, 9, 8.0],
        "sum_bits": [1, 16, None],
    },
    SynthesisConfig: {
        "source": ["camera"],
        "batch_size": [0, 1.0],
        "warmup_steps": [-1],
        "steps": [-1, 0.5, True],
        "latent_dim": [0],
        "generator_lr": [0.0, float("inf")],
        "generator_betas": [[0.5, 0.9], (0.5,), (0.5, 1.0), (0.5, "0.9"), 0.5],
        "generator_schedule": ["cosine"],
        "generator": ["square"],
        "generator_width": [0],
        "num_images": [0],
        "image_steps": [0],
        "image_lr": [0, -1.0, 10**400],
        "image_schedule": ["step"],
        "roughness": [(-0.1, 1.0), (1.0, 0.0), (1.0,)],
        "contrast": [(0.5, 0.1), 0.5],
        "ce_temperature": [(0.0, 1.0), (2.0, 1.0)],
        "shift": [-1, 1.5],
        "shifted_share": [1.1, -0.5],
        "leaves_share": [1.5, -0.1],
        "ce_weight": [-1.0],
        "bns_weight": [-0.1, float("nan")],
        "alignment_weight": [-1],
        "diversity_weight": [float("inf")],
        "bns_reduction": ["none"],
        "class_reduction": ["batchmean"],
        "spread": ["variance"],
        "deviation_limits": [(2.0, 1.0), (0.0, 1.0), (1.0,), 0.5],
        "decay": [1.0, -0.5],
        "noise_mean": [-1.0],
        "noise_spread": [-1.0],
        "noise_relative": [1],
        "semantic_start": [-1, 2.0],
        "assignment": ["all"],
        "autocast": ["no"],
    },
    FinetuneConfig: {
        "steps": [-1, 3.0],
        "batch_size": [0],
        "images": ["disk"],
        "optimizer": ["lion"],
        "lr": [0, -1e-3, "fast", True],
        "momentum": [1.0],
        "weight_decay": [-1e-4],
        "schedule": ["linear"],
        "scale_lr_factor": [-1.0],
        "ce_weight": [-1.0],
        "kd_weight": [-1.0],
        "temperature": [0, -1.0, float("nan")],
        "kd_reduction": ["sum"],
        "grad_clip": [-1.0],
        "augment": [1],
        "rate_by_width": [1],
        "train_batch_norm": [None],
        "calibration_images": [0, 1.5],
        "autocast": [1],
    },
    ClusterQConfig: {
        "quantization": [{"weight_bits": 4}, None],
        "synthesis": [FinetuneConfig()],
        "finetune": [3],
        "seed": [-1, 2**32, 1.0, True],
        "preset": [None],
    },
}
CASES = [(cls, name, value) for cls, fields in BAD.items() for name, values in fields.items() for value in values]


def test_every_setting_has_a_bad_value_below() -> None:
    for cls, fields in BAD.items():
        assert set(fields) == {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


@pytest.mark.parametrize(("cls", "name", "value"), CASES)
def test_a_bad_value_is_named_with_what_was_wanted(cls: Any, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"(^|\.){name} is {re.escape(repr(value))}; wanted ."):
        cls(**{name: value})
    with pytest.raises(ValueError, match=f"{name} is"):
        replace(cls(), **{name: value})


@pytest.mark.parametrize("name", PRESETS)
def test_from_dict_refuses_what_the_classes_refuse(name: str) -> None:
    for section, field, value in (
        ("synthesis", "spread", "variance"),
        ("finetune", "temperature", 0),
        ("quantization", "weight_bits", 4.0),
        ("synthesis", "colour", 1),
    ):
        data = preset(name).to_dict()
        data[section][field] = value
        with pytest.raises(ValueError, match=field):
            ClusterQConfig.from_dict(data)
    with pytest.raises(ValueError, match="SynthesisConfig is 3; wanted a mapping"):
        ClusterQConfig.from_dict({"synthesis": 3})
    with pytest.raises(ValueError, match="wanted a mapping"):
        ClusterQConfig.from_dict([])  # type: ignore[arg-type]


def test_numbers_may_be_whole_and_bounds_are_where_they_are_said_to_be() -> None:
    assert FinetuneConfig(lr=1, temperature=1, grad_clip=0, momentum=0).lr == 1
    for bits in range(2, 9):
        assert QuantizationConfig(weight_bits=bits, first_layer_bits=bits).weight_bits == bits
    assert SynthesisConfig(generator_betas=(0, 0.9), semantic_start=0, decay=0.0).semantic_start == 0


@pytest.mark.parametrize(("field", "value"), [("activation_range", "ema"), ("gradient", "pass_through")])
def test_learned_steps_exclude_what_would_be_ignored(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"quantization.{field} is '{value}' with quantization.learned_scale"):
        QuantizationConfig(**{field: value})  # type: ignore[arg-type]
    assert getattr(QuantizationConfig(learned_scale=False, **{field: value}), field) == value  # type: ignore[arg-type]


def test_a_generator_must_be_trained_before_its_images_are_stored() -> None:
    idle = SynthesisConfig(source="generator")
    with pytest.raises(ValueError, match=r"synthesis\.warmup_steps and synthesis\.steps are both 0"):
        ClusterQConfig(synthesis=idle)
    with pytest.raises(ValueError, match=r"synthesis\.steps"):
        override(preset("default"), ["synthesis.source=generator"])
    for trained in (replace(idle, steps=1), replace(idle, warmup_steps=1)):
        assert ClusterQConfig(synthesis=trained).synthesis == trained
    assert ClusterQConfig(synthesis=idle, finetune=FinetuneConfig(images="stream")).synthesis == idle


def test_a_bank_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match=r"finetune\.images is 'stream' with synthesis\.source='bank'"):
        ClusterQConfig(finetune=FinetuneConfig(images="stream"))


@pytest.mark.parametrize("term", ["alignment_weight", "diversity_weight"])
def test_centroids_of_a_bank_are_set_after_some_rounds_and_before_the_last(term: str) -> None:
    synthesis = SynthesisConfig(image_steps=40, **{term: 0.5})  # type: ignore[arg-type]
    for rounds in (0, 40, 41):
        with pytest.raises(ValueError, match=rf"warmup_steps is {rounds} .*1 to 39 rounds.*image_steps // 4 = 10"):
            ClusterQConfig(synthesis=replace(synthesis, warmup_steps=rounds))
    for rounds in (1, 10, 39):
        assert ClusterQConfig(synthesis=replace(synthesis, warmup_steps=rounds)).synthesis.uses_centroids
    assert not ClusterQConfig().synthesis.uses_centroids


def test_a_loss_needs_a_term_unless_there_is_no_training() -> None:
    with pytest.raises(ValueError, match="at least one term"):
        FinetuneConfig(kd_weight=0.0)
    assert FinetuneConfig(kd_weight=0.0, steps=0).steps == 0
    assert FinetuneConfig(kd_weight=0.0, ce_weight=0.5).ce_weight == 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_hash_and_copies(name: str) -> None:
    config = preset(name)
    config = replace(config, quantization=replace(config.quantization, layer_bits={"fc": 8, "conv": 2}), seed=3)
    text = json.dumps(config.to_dict())
    assert type(config.to_dict()["quantization"]["layer_bits"]) is dict
    for same in (
        ClusterQConfig.from_dict(json.loads(text)),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        replace(config, quantization=replace(config.quantization, layer_bits={"conv": 2, "fc": 8})),
    ):
        assert same == config and hash(same) == hash(config)
    assert replace(config, quantization=replace(config.quantization, layer_bits={"fc": 8})) != config


def test_equal_settings_are_written_alike() -> None:
    texts = ["synthesis.roughness=[0, 1]", "synthesis.generator_betas=[0, 0.5]", "finetune.lr=1"]
    made = override(ClusterQConfig(), texts)
    assert made == override(ClusterQConfig(), [text.replace("0,", "0.0,").replace("1", "1.0") for text in texts])
    written = json.dumps(made.to_dict())
    assert '"roughness": [0.0, 1.0]' in written and '"lr": 1.0' in written
    # As a file has it whose author wrote whole numbers.
    data = json.loads(written)
    data["synthesis"]["roughness"], data["finetune"]["lr"] = [0, 1], 1
    assert json.dumps(ClusterQConfig.from_dict(data).to_dict()) == written
    # A whole number stays one where one is wanted.
    assert '"steps": 3' in json.dumps(override(ClusterQConfig(), ["finetune.steps=3"]).to_dict())


def test_layer_bits_cannot_be_changed() -> None:
    given = {"fc": 8}
    config = QuantizationConfig(layer_bits=given)
    given["fc"] = 2
    assert (
        config.layer_bits == {"fc": 8}
        and list(config.layer_bits) == ["fc"]
        and repr(config.layer_bits) == repr({"fc": 8})
    )
    with pytest.raises(TypeError):
        config.layer_bits["fc"] = 2  # type: ignore[index]
    assert any(line.startswith('quantization.layer_bits={"fc": 8}') for line in describe(ClusterQConfig(config)))


def test_paper_is_the_printed_method() -> None:
    config = preset("paper")
    synthesis, finetune = config.synthesis, config.finetune
    assert (synthesis.bns_weight, synthesis.alignment_weight, synthesis.diversity_weight) == (0.1, 0.9, 0.6)
    assert (synthesis.decay, synthesis.noise_mean, synthesis.noise_spread) == (0.8, 0.5, 1.0)
    assert (synthesis.bns_reduction, synthesis.class_reduction, synthesis.spread) == ("sum", "sum", "std")
    assert (finetune.temperature, finetune.kd_weight, finetune.kd_reduction) == (1.0, 1.0, "batchmean")
    assert config.quantization.weight_symmetric and config.quantization.activation_symmetric


def test_gdfq_is_the_released_code() -> None:
    config = preset("gdfq")
    synthesis, finetune = config.synthesis, config.finetune
    assert (synthesis.bns_weight, synthesis.bns_reduction, synthesis.spread) == (0.1, "mean", "var")
    assert not synthesis.uses_centroids
    assert (finetune.temperature, finetune.kd_weight, finetune.kd_reduction) == (20.0, 1.0, "mean")
    assert not config.quantization.weight_symmetric and not config.quantization.activation_symmetric


@pytest.mark.parametrize("name", ["paper", "gdfq"])
def test_published_presets_share_the_schedule(name: str) -> None:
    config = preset(name)
    assert config.preset == name and config.finetune.images == "stream" and config.synthesis.source == "generator"
    assert (config.synthesis.generator_schedule, config.finetune.schedule) == ("step", "step")
    assert (config.synthesis.generator_lr, config.synthesis.generator_betas) == (1e-3, (0.5, 0.999))
    assert (config.finetune.lr, config.finetune.momentum, config.finetune.weight_decay) == (1e-4, 0.9, 1e-4)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'best' is not one of default, paper, gdfq"):
        preset("best")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("quantization.weight_bits=9", "quantization.weight_bits is 9; wanted whole number at least 2 and at most 8"),
        ("finetune.temperature=0", "finetune.temperature is 0; wanted number above 0"),
        ("synthesis.spread=mad", "synthesis.spread is 'mad'; wanted std | var"),
        ("synthesis.decay=NaN", "synthesis.decay is nan"),
        ("finetune.lr=1" + "0" * 400, "finetune.lr is 1000"),
        ('quantization.layer_bits={"fc": 1}', "quantization.layer_bits is"),
        ("synthesis.alignment_weight=0.5", "image_steps // 4 = 37"),
    ],
)
def test_the_command_line_refuses_the_same(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        override(preset("default"), [assignment])
