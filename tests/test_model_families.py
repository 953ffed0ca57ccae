"""model_families.py: what it finds, and that it notices when a family is not as it is listed."""

import model_families
import torch

import sppo_rlhf_imdb


def test_families_that_run_one_that_is_refused_and_what_is_not_as_listed(capsys, monkeypatch):
    families = ["gpt2", "mamba", "rwkv"]
    assert model_families.main(["gemma3", "opt with projections"]) == 0  # sizes kept elsewhere
    capsys.readouterr()
    assert model_families.main(families) == 0
    header, _, *rows = (line.split(" | ") for line in capsys.readouterr().out.strip("|\n").split("|\n|"))
    found = {family.strip(): (float(short), float(long), verdict.strip()) for family, short, long, verdict in rows}
    assert len(header) == 4 and list(found) == families
    assert max(found["gpt2"][:2]) < 1e-5 > max(found["mamba"][:2]) and found["gpt2"][2] == found["mamba"][2] == "runs"
    assert min(found["rwkv"][:2]) > 0.1 and found["rwkv"][2].startswith("refused: padding goes into its recurrent sta")
    assert model_families.main(["phi3 with LongRoPE", "bert", "bert as a decoder"]) == 0
    _, _, long_rope, bert, decoder = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    assert float(long_rope[1]) < 1e-5 < 0.1 < float(long_rope[2]) and "refused where texts are long" in long_rope[3]
    assert float(bert[1]) > 0.1 and "later ones" in bert[3] and "runs" in decoder[3]

    def columns(network, tokens, attention_mask, **options):
        positions = torch.arange(attention_mask.shape[1]).expand_as(attention_mask)
        return network(tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False, **options)

    with monkeypatch.context() as patch:  # as if padding had positions too: mamba has none
        patch.setattr(sppo_rlhf_imdb, "run_network", columns)
        assert model_families.main(families) == 1
        assert capsys.readouterr().err == "error: not as listed: gpt2\n"
    with monkeypatch.context() as patch:  # a check that takes everything is noticed
        patch.setattr(model_families, "check_policy", lambda *_, **__: None)
        assert model_families.main(families) == 1
        assert capsys.readouterr().err == "error: not as listed: rwkv\n"
    monkeypatch.setattr(model_families, "REFUSED", {"mamba": "it is old"})
    assert model_families.main(families) == 1
    assert capsys.readouterr().err == "error: not as listed: mamba, rwkv\n"
    assert model_families.main(["gpt2", "gpt22"]) == 2
    assert capsys.readouterr().err.startswith("error: no family gpt22, only gpt2, openai-gpt, ")
