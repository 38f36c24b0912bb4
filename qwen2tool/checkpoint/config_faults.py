"""What makes readers refuse a config.json, or build another model than its tensors are: found without any reader.

transformers looks at some of this when it loads, at some only when it runs, each time with an error of its own; other
readers (vLLM, llama.cpp's converter) go by `architectures` and not by `model_type`. Costs nothing: no file is read.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen2tool.checkpoint.geometry import Config, effective_rope

ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
"""The RoPE types of transformers 5, each with the keys that it cannot do without."""
KINDS = ("full_attention", "sliding_attention")
"""Of Qwen2's layers."""
DTYPES = ("float64", "float32", "float16", "bfloat16", "float", "half", "double", "float8_e4m3fn", "float8_e5m2")
BIASLESS = ("Llama", "Mistral")
"""How the names of classes begin that Qwen2's tensors fit, but for the biases."""


def config_faults(config: Config, layers: int) -> Iterator[str]:
    """A sentence for each thing in the config.json of a Qwen2 of `layers` layers that readers refuse or cannot run."""
    yield from _rope_faults(config)
    yield from _layer_faults(config, layers)
    act = config.get("hidden_act", "silu")
    if not isinstance(act, str):
        yield f"hidden_act is {ascii(act)[:40]}, not the name of an activation: readers refuse it"
    dtype = config.get("dtype") or config.get("torch_dtype")
    if isinstance(dtype, str) and dtype.removeprefix("torch.") not in (*DTYPES, "auto"):
        yield f"dtype is {ascii(dtype)[:40]}, which torch does not have: transformers refuses it"


def _rope_faults(config: Config) -> Iterator[str]:
    scaling = effective_rope(config)[1]
    if scaling is None:
        return
    kind = scaling["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        known = ", ".join(ROPE_NEEDS)
        yield f"RoPE is to be scaled by the type {ascii(kind)[:40]}, which transformers does not have (it has {known})"
        return
    missing = [key for key in ROPE_NEEDS[kind] if scaling.get(key) is None]
    if missing:
        yield f"RoPE is to be scaled by {kind} without {', '.join(missing)}: transformers refuses that"
    factor = scaling.get("factor")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0):
        yield f"RoPE is to be scaled by the factor {ascii(factor)[:40]}, which is no positive number"


def _layer_faults(config: Config, layers: int) -> Iterator[str]:
    width = config.get("sliding_window")
    if width is not None and type(width) is not int:
        yield f"sliding_window is {ascii(width)[:40]}, not a whole number: transformers refuses it"
    types = config.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list):
        yield f"layer_types is {ascii(types)[:40]}, not a list with a word for each layer"
        return
    if len(types) != layers:
        yield f"layer_types has {len(types)} entries for {layers} layers: transformers refuses that"
    odd = next((kind for kind in types if kind not in KINDS), None)
    if odd is not None:
        yield f"layer_types has {ascii(odd)[:40]}, which no Qwen2 layer is ({' or '.join(KINDS)})"
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    if "sliding_attention" in types and window is None:
        yield (
            "layer_types lets layers slide, but there is no window (use_sliding_window and sliding_window): "
            "transformers fails when it runs"
        )


def other_class(config: Config) -> str | None:
    """A sentence where `architectures` of a Qwen2 names the class of a model without biases, else None."""
    names = config.get("architectures")
    if config.get("model_type") != "qwen2" or not isinstance(names, list) or not names or not isinstance(names[0], str):
        return None
    family = next((family for family in BIASLESS if names[0].startswith(family)), None)
    return family and (
        f"architectures says {ascii(names[0])[1:-1][:60]} where model_type is qwen2: readers that go by it (vLLM, "
        f"llama.cpp's converter) take the model for a {family}, which has no q, k and v biases"
    )
