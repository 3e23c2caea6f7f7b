"""DivPrune keeps what its literal reference keeps."""

import csrc_ref
from tests.method_checks import against_its_reference, check_choice


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    def choose(layer, row, places, count, frames):
        return csrc_ref.greedy_max_min(layer.embeds[row, places], count).mask

    check_choice(three_layers, "divprune", budget, keep_ratio, choose)
