"""What two scripts call the same they write the same, so that a fix goes into all of them; what may differ is listed.

Names are those of functions, classes, constants and groups of imports, and of the members of Args and Learner.
"""

import ast
from itertools import combinations

import pytest
from conftest import LANGUAGE, ROOT, SCRIPTS

ALGORITHM = """
docstring
Args.alpha Args.beta Args.learning_rate Args.anneal_lr Args.num_envs Args.num_steps Args.gae_lambda Args.vf_coef
gradients Learner.__init__ train validate
"""
DOMAIN = """
docstring Import ImportFrom PACKAGES env_seeds Agent logprob_and_entropy gradients train evaluate
load_model open_run_dir save_results validate run main
"""
# symmetric_ppo_loss is 2-D and masked here: test_loss.py compares it with the others.
LANGUAGE_DOMAIN = "TRAINING symmetric_ppo_loss gae create_run_dir open_run_dir"
TASK = """
docstring ImportFrom PACKAGES OOM_HINT TOKENIZERS ActorCritic generate Learner.docstring Learner.__init__ Learner.score
encode_prompts rollout train evaluate evaluate_saved summary save_policy validate run
Args.policy Args.reward_model Args.dataset Args.num_updates Args.beta Args.kl_coef Args.target_coef Args.prompt_length
Args.response_length Args.min_response_length Args.top_k Args.num_trajectories Args.update_epochs Args.minibatch_size
Args.micro_batch_size Args.rollout_batch_size Args.weight_decay Args.gamma Args.vf_coef Args.max_grad_norm
Args.eval_samples
"""


def parts(path):
    """{name: source with the comments above it} of a script's statements in order; Args and Learner by member."""
    source = path.read_text()
    lines, result = source.splitlines(), {}

    def split(body, start, prefix, name):
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name in ("Args", "Learner"):
                first = node.body[0].lineno - 1
                result[f"class {node.name}"] = "\n".join(lines[start:first]).strip()
                split(node.body, first, f"{node.name}.", f"{node.name}.docstring")
            else:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    name = prefix + node.name
                elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                    target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                    name = prefix + target.strip("()").partition(",")[0]
                elif not isinstance(node, ast.Expr):  # a field's docstring belongs to the field
                    name = type(node).__name__
                result[name] = "\n".join([result.get(name, ""), *lines[start : node.end_lineno]]).strip()
            start = node.end_lineno

    split(ast.parse(source).body, 0, "", "docstring")
    return result


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)))
def test_scripts_write_the_same_what_they_call_the_same(one, other):
    ours, theirs = parts(ROOT / f"{one}.py"), parts(ROOT / f"{other}.py")
    common = ours.keys() & theirs.keys()
    if {one, other} <= set(LANGUAGE):
        allowed = TASK
    elif one.partition("_")[2] == other.partition("_")[2]:
        allowed = ALGORITHM
    else:
        allowed = ALGORITHM + DOMAIN + (LANGUAGE_DOMAIN if {one, other} & set(LANGUAGE) else "")
        common = {name for name in common if not name.startswith(("Args.", "Learner."))}
    assert len(common) > 20
    assert {name for name in common if ours[name] != theirs[name]} <= set(allowed.split())
