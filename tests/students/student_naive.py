"""A training loop written from the definition, and examples to train on."""

import torch

from pipeline.params import TuningParams
from pipeline.students.batches import Example, Order, Term
from pipeline.students.optimizer import learning_rate

SINGLE = [[5], [9]]
MULTI = [[5], [9, 3, 7]]


def make_examples(count, seed=0, gold=False):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        ids = tuple(torch.randint(1, 300, (length,), generator=generator).tolist())
        share = float(number % 2) if gold else float(torch.rand(1, generator=generator))
        made.append(Example(f"{seed:032x}{number:032x}", ids, (1 - share, share)))
    return tuple(made)


def kl_term(count=10, batch_size=4, weight=1.0):
    return Term("kl", weight, batch_size, make_examples(count))


def gold_term(count=4, batch_size=2, weight=0.5):
    return Term("cross_entropy", weight, batch_size, make_examples(count, seed=9, gold=True))


def tuning(**changes):
    return TuningParams(**({"steps": 5, "batch_size": 4, "learning_rate": 1e-3} | changes))


def naive_training(model, completions, terms, params, learnt=None):
    """The same training from the definition: one row at a time, the whole vocabulary, torch's default AdamW, clipping by hand.

    `learnt` are the parameters that are learnt; None: all.
    """
    model.requires_grad_(learnt is None)
    for parameter in learnt or ():
        parameter.requires_grad_(True)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    decayed = [p for p in model.parameters() if p.dim() >= 2 and p is not head and p is not embedding]
    # a position table is an embedding too
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    decayed = [p for p in decayed if all(p is not table for table in tables)]
    rest = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": params.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=params.learning_rate, fused=False, foreach=False)
    orders, losses = [Order(term, params.seed) for term in terms], []
    for step in range(params.steps):
        total = torch.zeros(())
        for term, order in zip(terms, orders, strict=True):
            batch = order.batch(step)
            for example in batch:
                scores = []
                for completion in completions:
                    logits = model(torch.tensor([[*example.ids, *completion]])).logits[0].log_softmax(-1)
                    scores.append(sum(logits[len(example.ids) - 1 + n, token] for n, token in enumerate(completion)))
                log_p = torch.stack(scores).log_softmax(-1)
                loss = sum(p * (torch.tensor(p).log() - log_p[n]) for n, p in enumerate(example.target) if p > 0)
                total = total + term.weight * loss / len(batch)
        optimizer.zero_grad()
        total.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None))
        for p in model.parameters():
            if p.grad is not None and norm > params.max_grad_norm:
                p.grad *= params.max_grad_norm / norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, params)
        optimizer.step()
        losses.append(float(total.detach()))
    return losses
