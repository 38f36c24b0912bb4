"""From the sections of a report to its verdict, its headline and its findings; `notes` has what is wrong for nobody.

Works on the same plain values that `Report.to_json()` gives away, so that every sentence can be traced to a number a
reader sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen2tool.checkpoint.biases import BIAS_DTYPES
from qwen2tool.checkpoint.inventory import QKV
from qwen2tool.checkpoint.names import difference
from qwen2tool.checkpoint.notes import count, extra_stats, notes
from qwen2tool.console import format_number

Sections = dict[str, Any]
QKV_BIASES = tuple(f".self_attn.{projection}_proj.bias" for projection in QKV)
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """`verdict` is one of the five of `report`, `headline` a sentence on the biases, `biases_sound` whether it is good.

    A finding makes the checkpoint wrong for somebody, a note does not.
    """

    verdict: str
    biases_sound: bool
    headline: str
    findings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def state(self) -> str:
        """Of the biases, in a word."""
        return "sound" if self.biases_sound else "unknown" if self.verdict.startswith("not") else "WRONG"


def judge(sections: Sections) -> Judgement:
    """The verdict on `sections`, with what is wrong and what is merely worth knowing."""
    verdict = _verdict(sections)
    if verdict.startswith("not qwen2"):
        headline = f"{verdict}: nothing is said about its biases"
        return Judgement(verdict=verdict, biases_sound=False, headline=headline, findings=(), notes=())
    damage = _damage(sections["biases"], sections)
    findings = [
        *_bias_findings(sections),
        *_bias_value_findings(sections),
        *_tensor_findings(sections),
        *_config_findings(sections),
        *(f"{name}: {why}" for name, why in sections["files"]["damaged"].items()),
        *_value_findings(sections),
    ]
    headline = damage or _all_there(sections["biases"])
    if sections["files"]["format"] == "gguf":
        headline, *findings = (text.replace("config.json", "the GGUF's metadata") for text in (headline, *findings))
    return Judgement(
        verdict=verdict,
        biases_sound=damage is None,
        headline=headline,
        findings=tuple(findings),
        notes=tuple(notes(sections)),
    )


def _verdict(sections: Sections) -> str:
    kind, biases = sections["geometry"]["model_type"], sections["biases"]
    if kind not in ("qwen2", "llama"):
        return "not qwen2 (Qwen 1: convert it)" if kind == "qwen" else f"not qwen2 (model_type is {kind!r})"
    if not sections["tensors"]["has_layers"]:
        return f"not qwen2 (model_type is {kind!r}, but no tensor is named model.layers.*{_other_names(sections)})"
    if kind == "llama":
        return "llama layout with qwen2 biases" if biases["present"] else "llama layout without biases"
    return "qwen2 with missing biases" if biases["missing"] else "qwen2"


def _other_names(sections: Sections) -> str:
    """How the names differ, where they are the architecture's but for the words of a wrapper."""
    renamed = sections["tensors"]["renamed"]
    name = next((name for name in renamed if name.startswith("model.layers.")), None)
    return f": the names come {difference(name, renamed[name])}, so rename them" if name else ""


def _damage(biases: Sections, sections: Sections) -> str | None:
    """What is wrong with the biases, in the words that a worried user reads first; None where nothing is."""
    expected, missing, zero, shape = biases["expected"], biases["missing"], biases["zero"], sections["geometry"]
    if missing == expected and shape["model_type"] == "llama":
        return f"none of the {expected} q/k/v biases that a Qwen2 has is there; a Llama has none"
    if missing:
        renamed = sum(name.endswith(QKV_BIASES) for name in sections["tensors"]["renamed"])
        under = ", all of them there under other names" if renamed == missing else ""
        return f"{missing} of {expected} q/k/v biases are MISSING{under}"
    but = f"all {expected} q/k/v biases are there, but"
    if len(zero) == expected:
        return f"{but} every one is zero: they were lost, and zeros saved in their place"
    if zero:
        return f"{but} {_of_them(len(zero))} nothing but zeros"
    if biases["not_finite"]:
        return f"{but} {_of_them(len(biases['not_finite']))} NaN or Inf"
    if odd := _odd_dtypes(biases):
        return f"{but} {sum(odd.values())} of them as {', '.join(odd)}, which is no bias that can be added"
    if biases["read"] and len(_norms(biases)) < expected:
        return f"{but} {expected - len(_norms(biases))} of them in a shape that is no bias"
    if misshapen := [name for name in sections["tensors"]["misshapen"] if name.endswith(QKV_BIASES)]:
        return f"{but} {len(misshapen)} of them in another size than config.json asks for"
    if not shape["attention_bias"]:
        return f"{but} config.json does not set attention_bias, so Llama readers drop them all"
    return None


def _of_them(number: int) -> str:
    return "1 of them holds" if number == 1 else f"{number} of them hold"


def _all_there(biases: Sections) -> str:
    there = f"all {biases['expected']} q/k/v biases are there"
    if not biases["read"]:
        return f"{there}, by name and shape; their numbers were not read, since the files are not here"
    low, high = min(_norms(biases)), max(_norms(biases))
    return f"{there}, none of them empty (norms {format_number(low)} to {format_number(high)})"


def _norms(biases: Sections) -> list[float]:
    return [stats["l2"] for row in biases["stats"].values() for p, stats in row.items() if p in QKV]


def _odd_dtypes(biases: Sections) -> dict[str, int]:
    return {dtype: number for dtype, number in biases["dtypes"].items() if dtype not in BIAS_DTYPES}


def _bias_findings(sections: Sections) -> Iterator[str]:
    biases, llama = sections["biases"], sections["geometry"]["model_type"] == "llama"
    if biases["missing"] and (biases["present"] or not llama):
        layer, projection = next(
            (layer, p) for layer, states in biases["layers"].items() for p, s in states.items() if s == "missing"
        )
        packed = (
            " beside packed weights, which keep theirs in 16 or 32 bit," if sections["quantization"]["evidence"] else ""
        )
        yield (
            f"{biases['missing']} of {biases['expected']} q/k/v biases are missing{packed or ','} the first is "
            f"model.layers.{layer}.self_attn.{projection}_proj.bias: readers fill them with zeros and go on"
        )
    if llama and biases["present"] and not sections["geometry"]["attention_bias"]:
        yield (
            f"attention_bias is not set in config.json: a Llama reader drops the {biases['present']} q/k/v biases "
            "that are in the files"
        )
    for dtype, number in _odd_dtypes(biases).items():
        yield (
            f"{number} q/k/v biases are stored as {dtype}: every format, packed ones too, keeps them in 16 or 32 bit, "
            "so readers drop them or add garbage"
        )


def _bias_value_findings(sections: Sections) -> Iterator[str]:
    """What the numbers of the biases give away, where they were read."""
    biases = sections["biases"]
    zero = biases["zero"]
    if zero and len(zero) == biases["present"]:
        yield (
            "all q/k/v biases are zero in every layer: they were re-initialised, as a reader does that does not find "
            "them; go back to the original checkpoint"
        )
    elif zero:
        yield f"{len(zero)} of {biases['present']} q/k/v biases are all zero, the first is {zero[0]}"
    values = sections["values"]
    broken = biases["not_finite"] if values is None else values["not_finite"]
    if broken:
        yield f"{count(broken, 'tensor')} not finite (NaN or Inf), the first is {broken[0]}"
    trained = [name for name, stats in extra_stats(biases) if stats["max_abs"]]
    if trained and sections["quantization"]["evidence"] and sections["geometry"]["model_type"] == "qwen2":
        yield (
            f"{len(trained)} biases beside q, k and v are not zero ({trained[0]} first): no Qwen2 has them, and "
            "readers that add them get another model"
        )


def _tensor_findings(sections: Sections) -> Iterator[str]:
    tensors = sections["tensors"]
    renamed = tensors["renamed"]
    missing = [name for name in tensors["missing"] if not name.endswith(".bias") and name not in renamed]
    extra = [n for n in tensors["extra"] if not _explained(n, sections) and n not in renamed.values()]
    if renamed:
        name, other = next(iter(renamed.items()))
        yield (
            f"{count(renamed, 'tensor')} there under other names ({difference(name, other)}), the first is {other}: "
            "rename them, or save the model again without what wraps it"
        )
    if "lm_head.weight" in missing and not sections["head"]["tied"]:
        missing.remove("lm_head.weight")
        yield (
            "the head is not tied, but lm_head.weight is absent: readers make up a random head (if the head was tied, "
            "config.json has lost tie_word_embeddings)"
        )
    if missing:
        yield f"{count(missing, 'tensor')} missing, the first is {missing[0]}"
    if tensors["misshapen"]:
        name, shapes = next(iter(tensors["misshapen"].items()))
        yield (
            f"{count(tensors['misshapen'], 'tensor')} of another shape than config.json says, the first is {name}: "
            f"it has {shapes['found']}, config.json asks for {shapes['expected']}"
        )
    if not sections["quantization"]["evidence"]:
        for dtype in INTEGERS:
            if dtype in tensors["dtypes"]:
                number = range(tensors["dtypes"][dtype]["tensors"])
                yield (
                    f"{count(number, 'tensor')} stored as whole numbers ({dtype}) with nothing that says how to scale "
                    "them: readers take them for the weights themselves"
                )
    if extra:
        yield f"{count(extra, 'tensor')} there that no such model has, the first is {extra[0]}"


def _explained(name: str, sections: Sections) -> bool:
    """Extra tensors that the verdict or a note speaks of: a Llama's biases, the zero biases of GPTQ writers."""
    return name.endswith("_proj.bias") and (
        sections["geometry"]["model_type"] == "llama" or bool(sections["quantization"]["evidence"])
    )


def _config_findings(sections: Sections) -> Iterator[str]:
    if sections["geometry"]["model_type"] in ("qwen2", "llama"):
        yield from sections["config"]["faults"]
    if sections["config"]["other_class"]:
        yield sections["config"]["other_class"]
    shape, rope, tokens = sections["geometry"], sections["rope"], sections["tokenizer"]
    if shape["num_attention_heads"] % shape["num_key_value_heads"]:
        yield (
            f"{shape['num_attention_heads']} attention heads cannot share {shape['num_key_value_heads']} "
            "key/value heads evenly"
        )
    if rope["disagreement"] and len(rope["spelled_in"]) == 2:
        yield rope["disagreement"]
    if tokens and tokens["rows_needed"] > tokens["vocabulary_rows"]:
        yield (
            f"the tokenizer's highest id is {tokens['rows_needed'] - 1}, but the embedding has only "
            f"{tokens['vocabulary_rows']} rows"
        )
    beyond = [stop["id"] for stop in sections["generation"]["stops_at"] if not 0 <= stop["id"] < shape["vocab_size"]]
    if beyond:
        yield f"generation stops at id {beyond[0]}, which the vocabulary of {shape['vocab_size']} rows does not have"
    if sections["files"]["adapter"] and sections["files"]["format"] != "gguf":
        yield (
            "adapter_config.json lies beside the weights: transformers adds that adapter when it loads this folder, "
            "other readers do not; keep it in a folder of its own"
        )
    quantization = sections["quantization"]
    if quantization["config"] is not None and not quantization["evidence"]:
        yield "config.json has a quantization_config, but no tensor is stored packed"
    if quantization["config"] is None and quantization["evidence"] and sections["files"]["format"] != "gguf":
        yield f"tensors are stored packed ({', '.join(quantization['evidence'])}), but config.json does not say so"


def _value_findings(sections: Sections) -> Iterator[str]:
    values = sections["values"]
    if values is not None and values["zero_weights"]:
        yield f"{count(values['zero_weights'], 'weight')} all zero, the first is {values['zero_weights'][0]}"
    if sections["head"]["lm_head"] == "different":
        yield "the head is tied, but lm_head.weight differs from the embedding: readers drop one of them"
