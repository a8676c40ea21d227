"""BERT as an ONNX graph: token ids in, one vector of length 1 for each text out.

    vectors[n, d] = L2(mean over the mask of encoder(word[ids] + position + type))

The encoder is that of Devlin et al. 2018 (arXiv:1810.04805): layer norm after each residual, exact GELU, no cache.
With `int8`, the weights of the products and of the word table are int8 with one scale for each output channel or word,
and the rows that they meet are quantized as they come, each token's by its own largest magnitude: unlike one scale for
the whole batch, that leaves a text's vector independent of the texts that happen to be computed beside it.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from shared.gguf import ModelInvalid

OPSET, IR_VERSION = 20, 9
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY = 48, 4096, 1 << 20

GELU_FLOOR = 0.17
"""GELU is nowhere below -0.16998."""
TINY = np.float32(1e-30)

Array = npt.NDArray[Any]
Rows = Literal["any", "norm", "gelu"]
"""What the rows of a product came out of, which says how they are quantized best."""


class BertConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What of a `config.json` decides the graph; other fields are not looked at."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"

    def __post_init__(self) -> None:
        kind = (self.model_type, self.hidden_act, self.position_embedding_type)
        if kind != ("bert", "gelu", "absolute"):
            raise ModelInvalid(f"a model of the kind {kind} cannot be converted, only BERT", param="model")
        sizes = (self.num_hidden_layers, self.num_attention_heads, self.hidden_size, self.intermediate_size)
        limits = (MAX_LAYERS, self.hidden_size, MAX_WIDTH, 4 * MAX_WIDTH)
        rest = (self.vocab_size, self.max_position_embeddings)
        fits = all(0 < size <= limit for size, limit in zip(sizes, limits, strict=True))
        if not fits or not all(0 < size <= MAX_VOCABULARY for size in rest) or not 0 < self.layer_norm_eps < 1:
            raise ModelInvalid("config.json has a size that cannot be", param="model")
        if self.hidden_size % self.num_attention_heads:
            raise ModelInvalid("config.json: hidden_size is no multiple of num_attention_heads", param="model")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


def bert_graph(config: BertConfig, weights: Mapping[str, Array], *, int8: bool) -> ModelProto:
    """The same bytes for the same weights. Raises ModelInvalid for a weight that is not there or has another shape."""
    graph = _Graph(_Weights(weights), int8=int8)
    hidden, bias = _embedded(graph, config), _mask_bias(graph)
    for number in range(config.num_hidden_layers):
        name = f"encoder.layer.{number}"
        hidden = _attention(graph, config, f"{name}.attention", hidden, bias)
        width, wider = config.hidden_size, config.intermediate_size
        wide = graph.add("Gelu", graph.linear(hidden, [f"{name}.intermediate.dense"], width, wider, "norm"))
        narrow = graph.linear(wide, [f"{name}.output.dense"], wider, width, "gelu")
        hidden = graph.norm(graph.add("Add", narrow, hidden), f"{name}.output.LayerNorm", config)
    _pooled(graph, hidden)
    return graph.model(config.hidden_size)


def _embedded(graph: "_Graph", config: BertConfig) -> str:
    """Words and positions; a single text is all of type 0, whose row the positions carry."""
    width = config.hidden_size
    position = graph.weights.take("embeddings.position_embeddings.weight", (config.max_position_embeddings, width))
    kinds = graph.weights.take("embeddings.token_type_embeddings.weight", (2, width))
    words = graph.table("embeddings.word_embeddings.weight", "input_ids", (config.vocab_size, width))
    length = graph.add("Slice", graph.add("Shape", "input_ids"), graph.ints(1), graph.ints(2))
    places = graph.add("Slice", graph.hold(position + kinds[0]), graph.ints(0), length, graph.ints(0))
    return graph.norm(graph.add("Add", words, places), "embeddings.LayerNorm", config)


def _mask_bias(graph: "_Graph") -> str:
    """[n, 1, 1, t]: 0 where there is a token, far below everything where there is none."""
    gone = graph.add("Sub", graph.hold(np.float32(1)), graph.add("Cast", "attention_mask", to=TensorProto.FLOAT))
    return graph.add("Unsqueeze", graph.add("Mul", gone, graph.hold(np.float32(-1e9))), graph.ints(1, 2))


def _attention(graph: "_Graph", config: BertConfig, name: str, hidden: str, bias: str) -> str:
    width, size = config.hidden_size, config.head_size
    parts = [f"{name}.self.{part}" for part in ("query", "key", "value")]
    heads = graph.ints(0, 0, 3, config.num_attention_heads, size)
    split = graph.add("Reshape", graph.linear(hidden, parts, width, 3 * width, "norm"), heads)
    # Queries and values as [n, head, t, size], keys as [n, head, size, t].
    orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    query, key, value = (
        graph.add("Transpose", graph.add("Gather", split, graph.hold(np.int64(at)), axis=2), perm=order)
        for at, order in enumerate(orders)
    )
    scale = graph.hold(np.float32(1 / math.sqrt(size)))
    scores = graph.add("Add", graph.add("Mul", graph.add("MatMul", query, key), scale), bias)
    mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), value)
    joined = graph.add("Reshape", graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), graph.ints(0, 0, width))
    out = graph.linear(joined, [f"{name}.output.dense"], width, width)
    return graph.norm(graph.add("Add", out, hidden), f"{name}.output.LayerNorm", config)


def _pooled(graph: "_Graph", hidden: str) -> None:
    """The sum over the tokens has the direction of their mean; only the direction is kept."""
    mask = graph.add("Unsqueeze", graph.add("Cast", "attention_mask", to=TensorProto.FLOAT), graph.ints(2))
    total = graph.add("ReduceSum", graph.add("Mul", hidden, mask), graph.ints(1), keepdims=0)
    graph.add("LpNormalization", total, axis=-1, p=2, out="vectors")


class _Weights:
    def __init__(self, given: Mapping[str, Array]) -> None:
        self._given = given

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        found = self._given.get(name, self._given.get(f"bert.{name}"))
        if found is None or found.shape != shape:
            raise ModelInvalid(f"the model has no weight {name} of the shape {shape}", param="model")
        weight = found.astype(np.float32)
        if not np.isfinite(weight).all():
            raise ModelInvalid(f"the weight {name} holds what is not a number", param="model")
        return weight


class _Graph:
    """Nodes as they are added, named by their number; `add` returns the name of a node's output."""

    def __init__(self, weights: _Weights, *, int8: bool) -> None:
        self.weights = weights
        self._int8 = int8
        self._nodes: list[Any] = []
        self._held: list[Any] = []

    def add(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def hold(self, value: Array | np.generic) -> str:
        name = f"c{len(self._held)}"
        self._held.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def ints(self, *values: int) -> str:
        return self.hold(np.array(values, np.int64))

    def norm(self, value: str, name: str, config: BertConfig) -> str:
        shape = (config.hidden_size,)
        scale, shift = (self.hold(self.weights.take(f"{name}.{part}", shape)) for part in ("weight", "bias"))
        return self.add("LayerNormalization", value, scale, shift, axis=-1, epsilon=config.layer_norm_eps)

    def linear(self, value: str, names: list[str], width: int, out: int, kind: Rows = "any") -> str:
        """One product for several linear layers of the same input, side by side; `out` outputs in all."""
        shape = (out // len(names), width)
        weight = np.concatenate([self.weights.take(f"{name}.weight", shape) for name in names]).T
        bias = np.concatenate([self.weights.take(f"{name}.bias", shape[:1]) for name in names])
        if not self._int8:
            return self.add("Add", self.add("MatMul", value, self.hold(np.ascontiguousarray(weight))), self.hold(bias))
        columns, scales = _quantized(weight, axis=0)
        if kind == "gelu":
            product = self._product_of_gelu(value, self.hold(columns))
            bias = bias - GELU_FLOOR * (columns * scales).sum(0)
        else:
            product = self._product(value, self.hold(columns), width if kind == "norm" else None)
        return self.add("Add", self.add("Mul", product, self.hold(scales)), self.hold(bias.astype(np.float32)))

    def table(self, name: str, ids: str, shape: tuple[int, int]) -> str:
        weight = self.weights.take(name, shape)
        if not self._int8:
            return self.add("Gather", self.hold(weight), ids)
        rows, scales = _quantized(weight, axis=1)
        row = self.add("Cast", self.add("Gather", self.hold(rows), ids), to=TensorProto.FLOAT)
        return self.add("Mul", row, self.add("Gather", self.hold(scales), ids))

    def _product(self, value: str, columns: str, width: int | None) -> str:
        """Rows of both signs. After a layer norm (of this `width`) one number of a row can be far larger than all
        others: it is taken out and multiplied by itself, so that the rest of the row keeps its precision."""
        alone = ""
        if width is not None:
            at = self.add("ArgMax", self.add("Abs", value), axis=-1, keepdims=1)
            row = self.add("Gather", columns, self.add("Squeeze", at, self.ints(2)))
            highest = self.add("GatherElements", value, at, axis=2)
            alone = self.add("Mul", highest, self.add("Cast", row, to=TensorProto.FLOAT))
            there = self.add("Equal", at, self.hold(np.arange(width, dtype=np.int64)))
            value = self.add("Where", there, self.hold(np.float32(0)), value)
        largest = self.add("ReduceMax", self.add("Abs", value), self.ints(-1), keepdims=1)
        scale = self._steps(largest, 127)
        whole = self.add("Add", self.add("Round", self.add("Div", value, scale)), self.hold(np.float32(128)))
        product = self._whole_product(whole, scale, columns, zero=128)
        return self.add("Add", product, alone) if alone else product

    def _product_of_gelu(self, value: str, columns: str) -> str:
        """Rows whose least number is known: all 255 steps lie above it."""
        lifted = self.add("Add", value, self.hold(np.float32(GELU_FLOOR)))
        scale = self._steps(self.add("ReduceMax", lifted, self.ints(-1), keepdims=1), 255)
        return self._whole_product(self.add("Round", self.add("Div", lifted, scale)), scale, columns, zero=0)

    def _steps(self, largest: str, count: int) -> str:
        """The scale of a row; one of zeros stays a row of zeros."""
        return self.add("Mul", self.add("Max", largest, self.hold(TINY)), self.hold(np.float32(1 / count)))

    def _whole_product(self, whole: str, scale: str, columns: str, *, zero: int) -> str:
        """uint8 rows by int8 columns: the pair that processors multiply fastest."""
        row = self.add("Cast", whole, to=TensorProto.UINT8)
        product = self.add("MatMulInteger", row, columns, self.hold(np.uint8(zero)))
        return self.add("Mul", self.add("Cast", product, to=TensorProto.FLOAT), scale)

    def model(self, width: int) -> ModelProto:
        size = ["texts", "tokens"]
        inputs = [
            helper.make_tensor_value_info(one, TensorProto.INT64, size) for one in ("input_ids", "attention_mask")
        ]
        output = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["texts", width])
        graph = helper.make_graph(self._nodes, "bert", inputs, [output], self._held)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="causeway")
        checker.check_model(model)
        return model


def _quantized(weight: Array, *, axis: int) -> tuple[Array, Array]:
    """int8, and the float32 scales along `axis`: weight = whole x scale, half a step off at most."""
    scale = np.maximum(np.abs(weight).max(axis=axis, keepdims=True), TINY) / np.float32(127)
    whole = np.ascontiguousarray(np.rint(weight / scale).astype(np.int8))
    return whole, scale.astype(np.float32).reshape(-1, 1) if axis else scale.astype(np.float32).reshape(-1)
