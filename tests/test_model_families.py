"""benchmark/model_families.py: what it finds, and that it notices when a family is not as it is listed."""

import model_families
import torch

import sppo_rlhf_imdb


def test_families_that_run_one_that_is_refused_and_what_is_not_as_listed(capsys, monkeypatch):
    families = ["gpt2", "mamba", "rwkv"]
    assert model_families.main(["gemma3", "opt with projections"]) == 0  # sizes kept elsewhere
    capsys.readouterr()
    assert model_families.main(families) == 0
    header, _, *rows = (line.split(" | ") for line in capsys.readouterr().out.strip("|\n").split("|\n|"))
    found = {family.strip(): (float(number), verdict.strip()) for family, number, verdict in rows}
    assert len(header) == 3 and list(found) == families
    assert found["gpt2"][0] < 1e-5 > found["mamba"][0] and found["gpt2"][1] == found["mamba"][1] == "runs"
    assert found["rwkv"][0] > 0.1 and found["rwkv"][1].startswith("refused: padding goes into its recurrent state")

    def columns(attention_mask):
        return torch.arange(attention_mask.shape[1]).expand_as(attention_mask)

    with monkeypatch.context() as patch:  # as if padding had positions too: mamba has none
        patch.setattr(sppo_rlhf_imdb, "positions", columns)
        assert model_families.main(families) == 1
        assert capsys.readouterr().err == "error: not as listed: gpt2\n"
    monkeypatch.setattr(model_families, "REFUSED", {"mamba": "it is old"})
    assert model_families.main(families) == 1
    assert capsys.readouterr().err == "error: not as listed: mamba, rwkv\n"
    assert model_families.main(["gpt2", "gpt22"]) == 2
    assert capsys.readouterr().err.startswith("error: no family gpt22, only gpt2, openai-gpt, ")
