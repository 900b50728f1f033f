"""How a checkpoint is quantised, from config.json or the file beside it that its tool writes instead."""

import os
from pathlib import Path

from xim_agent.facts.config_file import Config, read_config
from xim_agent.facts.model import QuantizationFacts

SIDE_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files that vLLM reads where config.json says nothing (`get_config_filenames`), and whose they are."""
_FIXED = {
    "mxfp4": QuantizationFacts(method="mxfp4", bits=4, group_size=32, weight_format="float"),
    "fp8": QuantizationFacts(method="fp8", bits=8, weight_format="float"),
    "fbgemm_fp8": QuantizationFacts(method="fbgemm_fp8", bits=8, weight_format="float"),
}
"""Methods whose name says it all. mxfp4: OCP Microscaling Formats, blocks of 32."""


def quantization_facts(config: Config, directory: Path) -> QuantizationFacts | None:
    """How the model in `directory` is quantised; `None` where nothing says that it is. Blocks.

    Raises:
        ModelUnreadable: a description is there and broken.
    """
    described = config.inner("quantization_config", "compression_config")
    if described is not None:
        return _described(described, (described.text("quant_method") or "unknown").lower())
    for name, method in SIDE_FILES.items():
        file = directory / name
        if os.path.exists(file):
            beside = read_config(file)
            return _described(beside, (beside.text("quant_method") or method).lower())
    return None


def _described(config: Config, method: str) -> QuantizationFacts:
    if method in _FIXED:
        return _FIXED[method]
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method.startswith("modelopt"):
        return _modelopt(config.inner("quantization") or config, method)
    if method == "bitsandbytes":
        four = config.flag("load_in_4bit")
        kind = (config.text("bnb_4bit_quant_type") or "fp4") if four else "int"
        bits = 4 if four else 8 if config.flag("load_in_8bit") else None
        return QuantizationFacts(method=method, bits=bits, weight_format=kind)
    group_size = _group(config, "group_size", "q_group_size")
    return QuantizationFacts(
        method=method,
        bits=config.integer("bits", "w_bit"),
        group_size=group_size,
        weight_format="int" if method in {"awq", "gptq"} else None,
        grouped_by_activation=method == "gptq" and group_size is not None and config.flag("desc_act"),
    )


def _compressed_tensors(config: Config) -> QuantizationFacts:
    """The first group that says how weights are stored; several differ in which layers, rarely in width."""
    scheme = config.inner("kv_cache_scheme")
    kv_bits = None if scheme is None else scheme.integer("num_bits")
    groups = config.inner("config_groups")
    for group in [] if groups is None else groups.inners():
        weights = group.inner("weights")
        if weights is not None:
            return QuantizationFacts(
                method="compressed-tensors",
                bits=weights.integer("num_bits"),
                group_size=_group(weights, "group_size"),
                weight_format=weights.text("type"),
                kv_cache_bits=kv_bits,
            )
    return QuantizationFacts(method="compressed-tensors", kv_cache_bits=kv_bits)


def _modelopt(config: Config, method: str) -> QuantizationFacts:
    algorithm = (config.text("quant_algo") or "").upper()
    four = "FP4" in algorithm
    kv_cache = (config.text("kv_cache_quant_algo") or "").upper()
    return QuantizationFacts(
        method="modelopt_fp4" if four else method,
        bits=4 if four else 8 if algorithm.startswith("FP8") else None,
        group_size=_group(config, "group_size"),
        weight_format="float" if "FP" in algorithm else None,
        kv_cache_bits={"FP8": 8, "NVFP4": 4}.get(kv_cache),
    )


def _group(config: Config, *names: str) -> int | None:
    """Weights that share a scale; -1 means one scale for a whole channel, which is `None` here."""
    return config.positive(*names)
