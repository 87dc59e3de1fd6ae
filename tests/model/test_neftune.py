import torch
from tiny_models import make_batch, make_model, make_policy

BATCH = make_batch((40, 10, 3))


def noise(policy, batch=BATCH):
    """What the embedding's output is raised by, in the order of the pass: [1, tokens with filler, width]."""
    seen = []
    handle = policy.causal.model.layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args or kwargs["hidden_states"])[0]), with_kwargs=True
    )
    alpha, policy._neftune = policy._neftune, 0.0
    policy.score(batch)
    policy._neftune = alpha
    policy.score(batch)
    handle.remove()
    return seen[1] - seen[0]


def test_noise_fits_each_documents_own_length():
    policy = make_policy(make_model(hidden_size=64))
    policy.set_neftune(5.0)
    policy.train_mode(True)
    change = noise(policy).detach()[0]
    start = 0
    for length in (40, 10, 3):
        bound = 5.0 / (length * 64) ** 0.5
        part = change[start : start + length - 1].abs()  # the last token is a target only
        assert 0.9 * bound < float(part.max()) <= bound * 1.0001
        assert abs(float(part.mean()) / bound - 0.5) < 0.1
        start += length - 1


def test_noise_is_for_training_only_and_comes_back_with_the_random_state():
    policy = make_policy(make_model())
    policy.set_neftune(5.0)
    quiet = policy.score(BATCH).logp
    assert torch.equal(quiet, policy.score(BATCH).logp)
    policy.train_mode(True)
    state = torch.get_rng_state()
    first = policy.score(BATCH).logp
    assert not torch.equal(first, policy.score(BATCH).logp)
    torch.set_rng_state(state)
    assert torch.equal(first, policy.score(BATCH).logp)
    policy.set_neftune(0.0)
    torch.testing.assert_close(policy.score(BATCH).logp, quiet)
