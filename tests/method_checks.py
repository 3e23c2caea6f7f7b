"""What the tests of the methods share: a batch, its first layer token by token, and comparisons with references."""

from collections.abc import Callable

import pytest
import torch

import csrc_ref
from hawk_kernels import prune
from hawk_kernels.methods import METHODS, Method, PrefillView, Segments
from hawk_kernels.selection import kept_count
from tests.family_checks import GREEDY as GREEDY_OF_FAMILIES
from tests.family_checks import watched
from tests.tiny_families import BY_NAME
from tests.tiny_models import BEGIN, END_OF_TURN, IMAGE, VIDEO, Picture, question, qwen_batch, words

TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 4, **GREEDY_OF_FAMILIES}
# two images, one image on another row, a row without any, and a video beside an image
RAGGED = [
    question([Picture(3, 3), Picture(2, 5)]),
    question(Picture(4, 3), seed=3, after=2),
    [BEGIN, *words(9), END_OF_TURN],
    question([Picture(2, 3, frames=4), Picture(1, 2)], seed=5),
]

# families whose first layer rotates otherwise than `rotated_text_queries` and its like can tell
ROTATE_OTHERWISE = {"gemma4", "gemma4_unified", "hunyuan_vl", "kimi_k25", "llama4"}
# one family of each kind of text model; the others are a tail that may run elsewhere
CORE = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "qwen3_5", "cohere2_vision", "exaone4_5", "muse_glimmer")


def families(names):
    """Parametrise a test by `name`; families outside `CORE` are marked as long tail."""
    marked = [pytest.param(name, marks=() if name in CORE else pytest.mark.long_tail) for name in names]
    return pytest.mark.parametrize("name", marked)


def rotating_families():
    """Families whose queries and keys after RoPE are known."""
    return [name for name in BY_NAME if name not in ROTATE_OTHERWISE]


def options_of(method):
    """Arguments without which `prune` refuses a method."""
    return {"head_weights": "uniform"} if METHODS[method].uses_head_weights else {}


def visual_tokens(inputs):
    """bool `[B, T]`, the placeholders of images and videos."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


class FirstLayer:
    """What the first layer sees of a batch, computed by the model's own modules.

    Attributes:
        embeds: `[B, T, hidden]`.
        positions: `[3, B, T]`, the axes of M-RoPE.
        queries, keys: `[B, H, T, D]` and `[B, Hkv, T, D]`, before RoPE.
        visual, text: bool `[B, T]`, the visual tokens, and the text tokens that rank them.
    """

    def __init__(self, model, inputs, query_mask):
        _, self.embeds, positions = watched(model, lambda: model(**inputs))
        self.positions = positions[-3:].expand(3, len(self.embeds), -1)
        layer = model.model.language_model.layers[0]
        normed = layer.input_layernorm(self.embeds)
        self.queries, self.keys = (
            projection(normed).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        self.visual, self.text = visual_tokens(inputs), query_mask

    def images(self, row):
        """The places of the visual tokens of each image of a row."""
        places = self.visual[row].nonzero().flatten()
        return places.tensor_split((places.diff() > 1).nonzero().flatten() + 1)


class GivenView(PrefillView):
    """A prompt of which a test says what methods may ask, without a model; rows may have different lengths.

    Args:
        lengths: visual tokens of each row.
        images: tokens of each image of each row, where each has a budget of its own.
        r: what is kept, where images have budgets.
        given: what the methods of the same names return.
    """

    def __init__(self, lengths, images=None, r=None, **given):
        width = max(lengths)
        self.candidates = torch.arange(width) < torch.tensor(lengths)[:, None]
        self.segments = None
        if images is not None:
            units = [(row, sum(sizes[:i]), size) for row, sizes in enumerate(images) for i, size in enumerate(sizes)]
            steps = torch.arange(max(size for *_, size in units))
            starts, sizes = torch.tensor([[row * width + start, size] for row, start, size in units]).T
            index = (starts[:, None] + steps).clamp(max=len(lengths) * width - 1)
            most = max(sum(kept_count(r, size) for size in sizes) for sizes in images)
            self.segments = Segments(index, steps < sizes[:, None], most)
        self._given = given

    def to(self, device):
        """Move the masks; what methods are given is where the test put it."""
        self.candidates = self.candidates.to(device)
        if self.segments is not None:
            index, mask = self.segments.index.to(device), self.segments.mask.to(device)
            self.segments = Segments(index, mask, self.segments.kept_per_row)
        return self

    def visual_embeddings(self):
        return self._given["embeddings"]

    def text_embeddings(self):
        return self._given["text"]

    def cls_attention(self):
        return self._given["attention"]

    def local_attention(self):
        return self._given["local"]

    def encoder_features(self):
        return self._given["features"]

    def frames(self):
        return self._given["frames"]

    def _not_given(self, *arguments):
        raise NotImplementedError

    text_queries = mean_text_query = visual_keys = encoder_attention = text_keys = entered = _not_given
    rotated_text_queries = rotated_visual_keys = last_query = layer_attention = row_keys = _not_given


class Reads(Method):
    """Keeps the tokens of the highest CLS attention, and remembers what the view gave."""

    name = "reads"
    uses_cls_attention = uses_encoder_features = True

    def __init__(self, cls_layer=None):
        self.cls_layer = cls_layer

    def score(self, view):
        self._seen = view.cls_attention(), view.encoder_features(), view.candidates
        return self._seen[0].masked_fill(~view.candidates, -torch.inf)


def encoder_of(model, inputs):
    """What the encoder tells of a batch: CLS attention `[B, M]`, features `[B, M, C]`, and which of the M count."""
    method = Reads()
    with torch.no_grad(), prune(model, 1.0, method=method):
        model(**inputs)
    return method._seen


def against_its_reference(test):
    """Parametrise a test by `budget` and `keep_ratio`."""
    by_ratio = pytest.mark.parametrize("keep_ratio", [0.3, 0.6, 3])
    return pytest.mark.parametrize("budget", ["shared", "per_image"])(by_ratio(test))


@torch.no_grad()
def check_choice(model, method: str, budget: str, keep_ratio: float | int, choose: Callable, **options) -> None:
    """`prune` keeps what `choose` keeps in every image, or in every row where images share the budget.

    Args:
        choose: called as `choose(layer, row, places, count, frames)` with the `FirstLayer`, the places of the visual
            tokens, how many of them stay, and the `(height, width)` of the frames; returns bool `[len(places)]`.
        options: of the method.
    """
    inputs = qwen_batch(*RAGGED)
    with prune(model, keep_ratio, method=method, budget=budget, **options_of(method), **options) as pruning:
        model(**inputs)
    layer = FirstLayer(model, inputs, pruning.query_mask)
    for row, items in enumerate(RAGGED):
        pictures = [item for item in items if isinstance(item, Picture)]
        images = list(layer.images(row)) if pictures else []
        units = list(zip(images, [[picture] for picture in pictures], strict=True))
        if budget == "shared" and pictures:
            units = [(torch.cat(images), pictures)]
        for places, inside in units:
            count = kept_count(keep_ratio, len(places))
            frames = [(picture.height, picture.width) for picture in inside for _ in range(picture.frames)]
            expected = choose(layer, row, places, count, frames)
            assert torch.equal(pruning.keep_mask[row, places], expected)
            assert int(expected.sum()) == count


@torch.no_grad()
def check_scores(model, method: str, budget: str, keep_ratio: float | int, score: Callable, **options) -> None:
    """`prune` gives each token the score that `score(layer, row, places)` gives it, and keeps the highest."""
    inputs = qwen_batch(*RAGGED)
    with prune(model, keep_ratio, method=method, budget=budget, **options_of(method), **options) as pruning:
        model(**inputs)
    layer = FirstLayer(model, inputs, pruning.query_mask)
    scores = torch.full(layer.visual.shape, -torch.inf)
    for row, visual in enumerate(layer.visual):
        if visual.any():
            scores[row, visual] = score(layer, row, visual.nonzero().flatten())
    assert torch.allclose(pruning.scores, scores, atol=TOLERANCE, rtol=TOLERANCE)

    def highest(layer, row, places, count, frames):
        return csrc_ref.select_topk(scores[row, places], count).mask

    check_choice(model, method, budget, keep_ratio, highest, **options)
