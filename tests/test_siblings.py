"""What two scripts call the same they write the same, so that a fix goes into all of them; what may differ is listed.

Names are those of functions, classes, constants, groups of imports, and members of Args, Classifier, Learner and Run.
"""

import ast
from itertools import combinations

import pytest
from conftest import ATARI, CONTINUOUS, LANGUAGE, ROOT, SCRIPTS

ALGORITHM = """
docstring
Args.alpha Args.beta Args.learning_rate Args.anneal_lr Args.num_envs Args.num_steps Args.gae_lambda Args.vf_coef
backward train RULES
"""
DOMAIN = """
docstring Import ImportFrom LOG_EVERY PACKAGES Envs Agent logprob_and_entropy backward train evaluate RULES check_args
load_model run
"""
# symmetric_ppo_loss is 2-D and masked here: test_loss.py compares it with the others.
LANGUAGE_DOMAIN = """
docstring Import ImportFrom PACKAGES VERSION TRAINING symmetric_ppo_loss gae backward train evaluate RULES say main
"""
TASK = """
docstring Import ImportFrom PACKAGES OOM_HINT TOKENIZERS ActorCritic Classifier.docstring Classifier.__init__
Classifier.__call__ Learner.docstring Learner.__init__ Learner.reference_logprobs make_examples evaluate
Run.save_policy RULES parse_args
Args.policy Args.reward_model Args.dataset Args.num_updates Args.beta Args.kl_coef Args.target_coef Args.prompt_length
Args.response_length Args.min_response_length Args.top_k Args.num_trajectories Args.update_epochs Args.minibatch_size
Args.micro_batch_size Args.rollout_batch_size Args.weight_decay Args.gamma Args.vf_coef Args.max_grad_norm
Args.eval_samples
"""


def parts(path):
    """{name: source with the comments above it} of a script's statements in order; some classes by member."""
    source = path.read_text()
    lines, result = source.splitlines(), {}

    def split(body, start, prefix, name):
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name in ("Args", "Classifier", "Learner", "Run"):
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


def differences(one, other):
    """The table of a pair of scripts and what differs of what they call the same."""
    ours, theirs = parts(ROOT / f"{one}.py"), parts(ROOT / f"{other}.py")
    common = ours.keys() & theirs.keys()
    if {one, other} <= set(LANGUAGE):
        allowed = TASK
    elif one.partition("_")[2] == other.partition("_")[2]:
        allowed = ALGORITHM
    else:
        allowed = LANGUAGE_DOMAIN if {one, other} & set(LANGUAGE) else DOMAIN
        common = {name for name in common if not name.startswith(("Args.", "Learner."))}
    assert len(common) >= 15
    return allowed, {name for name in common if ours[name] != theirs[name]}


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)))
def test_scripts_write_the_same_what_they_call_the_same(one, other):
    allowed, found = differences(one, other)
    assert found <= set(allowed.split())


# What one language script alone has. All else is in both: some tests of it run on one (test_rlhf.py: either).
ALONE = """
AugAssign ROUGE PROMPT_END encode_inside encode_prompts AdapterReward load_base eval_mode
Args.bfloat16 Args.base_precision Args.double_quant Args.gradient_checkpointing Args.lora_rank Args.lora_alpha
Args.lora_targets Args.reward_end Args.instruction
"""


def test_what_one_language_script_alone_has_is_listed():
    ours, theirs = (parts(ROOT / f"{script}.py").keys() for script in LANGUAGE)
    assert ours ^ theirs == set(ALONE.split())


@pytest.mark.parametrize("table", [ALGORITHM, DOMAIN, LANGUAGE_DOMAIN, TASK])
def test_what_is_listed_does_differ(table):
    pairs = [differences(*pair) for pair in combinations(SCRIPTS, 2)]
    assert set().union(*(found for allowed, found in pairs if allowed == table)) == set(table.split())


# What the algorithms have of their own in train, before its advantages.
OPTIMIZER = ("optimizer = ", "clip_coef = torch.tensor", "logprob_buf", "value_buf = torch.zeros")


@pytest.mark.parametrize("one, other", [CONTINUOUS, ATARI])
def test_train_of_a_domain_differs_in_optimizer_and_update_alone(one, other):
    """Start, resume, rollout, evaluation, log and checkpoints: their tests need one script of a domain."""
    before, after = [], []
    for name in (one, other):
        source = parts(ROOT / f"{name}.py")["train"]
        start, rest = source.split("        # Advantages")
        before.append([line for line in start.splitlines() if not any(words in line for words in OPTIMIZER)])
        after.append(rest.split("        # Evaluate, log, save")[1])
    assert before[0] == before[1] and len(before[0]) > 50
    assert after[0] == after[1] and after[0].count("\n") > 30
