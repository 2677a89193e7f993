# %% [markdown]
# # Vision Foundation Models
#
# A Vision Transformer (ViT) cuts a picture into patches and reads them like words {cite}`dosovitskiy2021vit`. The Segment Anything Model
# (SAM) puts such an encoder behind a prompt: you point at something, it draws the outline {cite}`kirillov2023sam`. Both inherit the oldest weakness
# of deep vision models: a change too small to notice can change the answer {cite}`szegedy2014intriguing`. And both can be taught a secret by
# whoever touches their training data. This chapter runs every technique of survey sections 2.1 and 2.2 {cite}`ma2025safety`.
#
# **You will learn to**
#
# - state a threat model: goal, knowledge, access, budget;
# - attack a ViT with gradients, with a patch, through its attention and its tokens, from another model, and with queries alone;
# - defend it, and judge each defense by an attack written against *it*;
# - plant a backdoor, measure it honestly, and look for one;
# - take a SAM's masks away, for one prompt, for all prompts, and for all pictures.
#
# **How to read it.** Each part follows one rhythm: the threat model, the attack and its source, a picture, a number with its control, the defense, the
# attack adapted to that defense, an exercise. The parts stand alone after the first; skip ahead if you know PGD.
#
# **Time and memory:** about four minutes (six on a slow machine) and under 3 GB on two CPU cores, offline. You need Python and some PyTorch.

# %% [markdown]
# ## A map of the chapter
#
# The survey sorts the field into a tree. Each row below is a branch of this chapter. The last column says for how many of its
# techniques the library has a function; it is computed from the code.

# %%
from safescale_lib import survey
from safescale_lib.measure.outcomes import table

sections = survey.node("vfm").children
covered = survey.coverage()
rows = [
    (s.title.split()[-1], b.title, len(b.leaves()), covered.count(b.key).bound)
    for s in sections
    for b in s.children
]
table(
    "Chapter 2: threats and defenses",
    ["model", "branch", "techniques", "in the library"],
    rows,
)

# %% [markdown]
# The first part below is the ground all others stand on: one threat told from end to end, with the classical gradient attacks that the ViT's own
# attacks start from. Everything later is measured against what happens there.

# %% [markdown]
# ## The world and the victim
#
# All chapters look at one toy world. A scene shows one object - a drawn shape or a *real* handwritten digit
# {cite}`alpaydin1998digits` - in one of eight colours on a textured ground. Nothing in it can hurt anybody, and you know
# the truth about every pixel. Training, validation and test scenes share neither a random seed nor a digit image.

# %%
import torch

from safescale_lib import figures, zoo
from safescale_lib.world.scenes import KINDS, scenes

torch.set_num_threads(1)  # the library runs two batches, or trainings, side by side

sheet = scenes(36, split="test", seed=7)

# %%
grid = figures.image_grid(sheet.images.split(12), cell=0.62)
figures.show(
    grid,
    "fig-scenes",
    caption="Thirty-six test scenes, 32 x 32 pixels each. The digits are scanned handwriting.",
    alt="A grid of 36 small pictures: shapes such as rings, stars and hearts, and handwritten digits, "
    "in bright colours on dark textured backgrounds.",
)

# %% [markdown]
# The victim is a stock `ViTForImageClassification` with trained weights that ship with the book. Its model card says how it was
# trained. `zoo.load` checks the files against their checksums and returns a plain function from pixels in [0, 1] to
# logits; normalisation happens inside, so that a budget in pixels means what it says.

# %%
vit = zoo.load("vit")
test = scenes(200, split="test", seed=2)
f"{sum(p.numel() for p in vit.parameters()):,} parameters, {len(vit.classes)} classes"

# %% [markdown]
# First measure without any attack. Every later number is compared with this one.

# %%
from safescale_lib.measure.intervals import rate
from safescale_lib.measure.outcomes import Outcome, Outcomes, claim, robust_accuracy

ATTACK = "vfm.vit.adversarial_attack"
right = (vit(test.images).argmax(-1) == test.labels).numpy()
clean = Outcome(ATTACK, "no attack", "clean accuracy", rate(right), items=right)
clean

# %%
claim(
    "the victim is good: without an attack it is right on more than nine scenes in ten",
    clean > 0.9,
)

# %% [markdown]
# Read the card from the top: what ran, the number, how sure it is (a 95 % Wilson interval {cite}`wilson1927` over n
# scenes), then what it was compared with and what it cost. A *claim* is a sentence that was checked when the notebook ran.
# Had it failed, you would see an error in its place.

# %% [markdown]
# ## Survey 2.1: adversarial attacks on ViT
#
# ### The threat model
#
# | | |
# |---|---|
# | **Goal** | untargeted: any wrong class will do |
# | **Knowledge** | white-box: the attacker has the weights and can differentiate |
# | **Access** | may change every pixel of the input before the model sees it |
# | **Budget** | each pixel moves by at most eps = 8/255, eight grey levels of 256 ($L_\infty$ ball); the result must be a valid 8-bit picture |
#
# The budget stands for "a person would not notice". It is a convention, not a law: real attackers also rotate, crop and
# print.

# %%
from safescale_lib.measure.criteria import Misclassified

EPS = 8 / 255
wrong = Misclassified(test.labels)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# `Misclassified` is the *criterion*. The attack never decides for itself whether it won: the criterion looks at the model's answer
# to the very picture the attack returns. Scenes the model gets wrong anyway are skipped and never counted as a success.
#
# ### The control: random noise
#
# Before any clever attack, try a stupid one with the same budget and the same number of model answers. If noise breaks the
# model, a gradient proves nothing.

# %%
from safescale_lib.search.pixels import random_noise

noise = random_noise(vit, test.images, wrong, eps=EPS, tries=20, generator=seeded(0))
noise_acc = robust_accuracy(
    noise,
    technique=ATTACK,
    method="random noise, best of 20, eps 8/255",
    clean=clean.value,
    seed=0,
)
noise_acc

# %% [markdown]
# Twenty random corners of the ball hardly matter. The direction is what counts.
#
# ### One step: the fast gradient sign method
#
# The gradient of the loss says for each pixel which way hurts the model most. FGSM {cite}`goodfellow2015fgsm` walks that way
# at once, as far as the budget allows:
#
# $$ x' = x + \varepsilon \, \mathrm{sign}\, \nabla_x L(f(x), y) $$

# %%
from safescale_lib.vfm.vit import adversarial_training, fgsm, pgd, quantised_input

one_step = fgsm(vit, test.images, wrong, eps=EPS)
fgsm_acc = robust_accuracy(
    one_step, technique=ATTACK, method="FGSM, eps 8/255", clean=clean.value
)
fgsm_acc

# %% [markdown]
# *Robust accuracy* is the share of all scenes the model still gets right. One gradient does what twenty random tries could not.

# %%
claim(
    "one step along the gradient beats twenty random steps of the same size",
    fgsm_acc < noise_acc,
)

# %% [markdown]
# ### Many small steps: projected gradient descent
#
# The loss is not a plane; its gradient changes on the way. PGD {cite}`madry2018pgd` takes many small steps and after each one
# projects back into the ball $B$ around the image:
#
# $$ x_{t+1} = \Pi_{B}\big( x_t + \alpha \, \mathrm{sign}\, \nabla_x L(f(x_t), y) \big) $$
#
# This is the whole search. You will meet it again in every chapter, pointed at other objectives.

# %% tags=["nbval-check-output"]
from safescale_lib.search import pixels

figures.source(pixels.ascend)

# %% [markdown]
# Two details are worth a look. The model only ever sees pictures that an 8-bit file can hold (`settle`), so a success is a success on disk.
# And an item leaves the batch as soon as it is broken (`stop`), which saves most of the work on a weak model.


# %%
def attack(model, seed=0, images=test.images, **other):
    """PGD-20 on the test scenes, or the first of them, at eps 8/255 unless told otherwise."""
    goal = Misclassified(test.labels[: len(images)])
    budget = {"eps": EPS, "steps": 20, "generator": seeded(seed), **other}
    return pgd(model, images, budget.pop("criterion", goal), **budget)


names = dict(technique=ATTACK, method="PGD-20, eps 8/255", clean=clean.value)
runs = [attack(vit, seed) for seed in (0, 1, 2)]
pgd_accs = [robust_accuracy(run, **names, seed=seed) for seed, run in enumerate(runs)]

# %%
Outcomes("PGD from three random starts", pgd_accs)

# %% [markdown]
# The random start matters little here. The step from one to twenty gradients matters a lot, and since both attacks saw the same
# scenes, the comparison is paired {cite}`mcnemar1947`.

# %%
pgd_acc = pgd_accs[0]
claim("PGD beats FGSM at the same eps", pgd_acc < fgsm_acc)

# %% [markdown]
# What did the attack change? Run it once more from the image itself and through every step, so that no random start hides the pattern.

# %%
whole = attack(
    vit, random_start=False, early_removal=False
)  # every step, from the image
picks = (whole.success & runs[0].success).nonzero()[:8, 0]
before, after = test.images[picks], whole.images[picks]
seen = vit(after).argmax(-1)
true_names, seen_names = ([KINDS[i] for i in k] for k in (test.labels[picks], seen))

# %%
figures.show(
    figures.image_grid(
        [before, (0.5 + (after - before) * 10).clamp(0, 1), after],
        [true_names, [""] * 8, seen_names],
        row_labels=["original", "change x 10", "attacked"],
    ),
    "fig-attacked",
    caption="Top: scenes with the true class. Middle: what PGD changed, ten times magnified "
    "around grey. Bottom: the attacked scenes with the class the ViT now sees.",
    alt="Eight scenes in three rows. The attacked scenes look like the originals; the "
    "magnified changes are fine coloured noise; the model's answers are all wrong.",
)

# %% [markdown]
# Look at the middle row. The change is not a picture of anything: fine noise, on the object and off it. But straight lines run through it, every
# eight pixels: there one patch of the ViT ends and the next begins. Several attacks of section 2.1 exploit that grid. You can name
# every object in the bottom row; the model cannot.
#
# ### The siblings
#
# PGD has many relatives: another norm, an accumulated gradient {cite}`dong2018mifgsm`, a fixed wrong class as the target. They are the same
# search with other arguments.

# %%
variants = {
    "PGD-20 with momentum 1, eps 8/255": dict(momentum=1.0),
    "PGD-20, L2, eps 1.0": dict(eps=1.0, norm="l2"),
}
gallery = [
    robust_accuracy(attack(vit, **other), **names | {"method": name}, seed=0)
    for name, other in variants.items()
]

# %% [markdown]
# A targeted attack needs another criterion, and nothing else.

# %%
from safescale_lib.measure.criteria import ClassifiedAs

shift = torch.randint(1, len(KINDS), test.labels.shape, generator=seeded(5))
target = ClassifiedAs((test.labels + shift) % len(KINDS), test.labels)
aimed = attack(vit, criterion=target)
hits = aimed.success[aimed.attempted].numpy()
targeted = Outcome(
    ATTACK, "PGD-20 to a random target, eps 8/255", "targeted success rate",
    rate(hits), control=0.0, utility=clean.value, cost=aimed.cost, seed=0, items=hits,
)  # fmt: skip
Outcomes("Relatives of PGD on the plain ViT", [*gallery, targeted])

# %% [markdown]
# The table holds robust accuracy (lower is a stronger attack) except in its last row, where a larger number is a stronger attack: there the
# attacker names the wrong class in advance, drawn at random, which is harder. Momentum was made for attacks that must transfer to another
# model. On the model itself it is no help:

# %%
claim(
    "accumulating gradients weakens PGD on the model it attacks", gallery[0] > pgd_acc
)

# %% [markdown]
# ### Budget and strength
#
# A real attack gets stronger with its budget, and with an unlimited budget it must always win. If it does not, suspect the attack.

# %%
levels = [0, 2, 4, 8, 16, 32]
few, few_wrong = test.images[:100], Misclassified(test.labels[:100])


def sweep(attack, model, **kw):
    return [
        rate(attack(model, few, few_wrong, eps=e / 255, **kw).survived.numpy())
        for e in levels
    ]


curves = {
    "random noise": sweep(random_noise, vit, tries=5, generator=seeded(0)),
    "FGSM": sweep(fgsm, vit),
    "PGD-20": sweep(pgd, vit, generator=seeded(0)),
}

# %% [markdown]
# Check the rule before you look at the picture.

# %%
values = [point.value for point in curves["PGD-20"]]
claim(
    "PGD never gets weaker with a larger budget, and 32/255 breaks everything",
    values == sorted(values, reverse=True) and values[-1] == 0,
    evidence="robust accuracy at eps 0 to 32/255: "
    + ", ".join(f"{v:.2f}" for v in values)
    + f", n = {len(few)}",
)


# %%
AXES = dict(xlabel="eps (grey levels of 255)", ylabel="robust accuracy")
figures.show(
    figures.curves(curves, levels, **AXES),
    "fig-budget",
    caption="Robust accuracy of the plain ViT against the budget, with 95 % intervals; gradients do what noise cannot.",
    alt="Three curves over eps from 0 to 32 grey levels. Random noise stays near the top until the largest budget, "
    "FGSM falls steadily, PGD falls fastest and reaches zero at 16.",
)

# %% [markdown]
# Twenty small steps are worth more than twice the budget. Noise of any size in this range does little: what it lacks is not
# strength but direction.

# %%
eight = curves["PGD-20"][levels.index(8)]
sixteen = curves["FGSM"][levels.index(16)]
claim(
    "PGD does more damage with eight grey levels than FGSM with sixteen",
    eight.value < sixteen.value,
    evidence=f"{eight} against {sixteen}, n = {len(few)}",
)

# %% [markdown]
# ### Turn the budget up yourself
#
# The curve counts scenes. What does one of them look like on its way to the wrong answer? Below, the first six test scenes that the
# model gets right are attacked once for every eps. Nothing is computed while you move the slider: the notebook made the pictures.

# %%
from safescale_lib import course

GREYS = [0, 2, 4, 8, 16, 32]
six = (vit(test.images[:24]).argmax(-1) == test.labels[:24]).nonzero()[:6, 0]
shown, truth = test.images[six], [KINDS[i] for i in test.labels[six]]


def budget_frame(grey):
    """One frame, and what is seen there, at eps = grey / 255."""
    goal = Misclassified(test.labels[six])
    made = pgd(vit, shown, goal, eps=grey / 255, steps=20, generator=seeded(0)).images
    said = [KINDS[i] for i in vit(made).argmax(-1)]
    change = (0.5 + (made - shown) * 8).clamp(0, 1)
    rows = ["attacked", "change x 8"]
    grid = figures.image_grid([made, change], [said, [""] * 6], row_labels=rows)
    right = sum(a == b for a, b in zip(said, truth, strict=True))
    return grid, f"The model is right on {right} of 6. It sees: {', '.join(said)}."


# %% [markdown]
# In the lower row grey means "unchanged". A scene whose attack fails comes back as it was, so it stays all grey.

# %%
frames, seen_at = zip(*map(budget_frame, GREYS), strict=True)
course.slider(
    "pgd-budget",
    label="eps (grey levels of 255)",
    values=GREYS,
    frames=frames,
    texts=seen_at,
    caption=f"Six scenes under PGD-20. The truth: {', '.join(truth)}.",
    alt="Six attacked scenes with the class the model sees, and below each the change, eight times magnified.",
)

# %% [markdown]
# Your eye names the objects at every position. The model gives up where the noise is still hard to see.

# %% [markdown]
# ## Survey 2.1: the defense, adversarial training
#
# If the attacker solves an inner problem, let the trainer solve the outer one {cite}`madry2018pgd`:
#
# $$ \min_\theta \; \mathbb{E}_{(x, y)} \Big[ \max_{\|\delta\|_\infty \le \varepsilon} L\big(f_\theta(x + \delta), y\big) \Big] $$
#
# Every batch is attacked first, by a short PGD, and the model learns from the attacked pictures.

# %% tags=["nbval-check-output"]
figures.source(adversarial_training)

# %% [markdown]
# Forty steps take seconds; run them now to watch robustness appear. The zoo holds the same thing done for longer (`vit-robust`); attack it
# meanwhile. (`side_by_side` runs independent jobs two at a time; their results are what they would be alone.)


# %%
from functools import partial

from safescale_lib.zoo.training import side_by_side


def batch(step):
    fresh = scenes(48, split="train", seed=step)
    return fresh.images, fresh.labels


robust = zoo.load("vit-robust")
hardened, held_robust = side_by_side(
    lambda: adversarial_training(vit, batch, eps=EPS, steps=40, progress=False),
    lambda: attack(robust),
)

# %%
DEFENSE = "vfm.vit.adversarial_defense.adversarial_training"


def accuracy(model, images=test.images):
    right = model(images).argmax(-1) == test.labels[: len(images)]
    return float(right.float().mean())


# %%
held = {"40 steps": attack(hardened), "vit-robust": held_robust}
defended = [
    robust_accuracy(
        held[name],
        technique=DEFENSE,
        method=f"{name}, under PGD-20",
        clean=accuracy(model),
        seed=0,
        trained=name == "40 steps",
    )
    for name, model in (("40 steps", hardened), ("vit-robust", robust))
]
hardened_acc, robust_acc = defended
Outcomes("The defense under the attack it was trained on", defended)

# %% [markdown]
# Compare the columns. The value is accuracy under attack; the utility is accuracy without one. A defense that paid for the first with the
# second would be no bargain.

# %%
claim(
    "adversarial training turns most attacked scenes from wrong to right",
    robust_acc > pgd_acc,
    robust_acc > 0.75,
)

# %% [markdown]
# What does it cost? The short training paid with clean accuracy, the long one hardly.

# %%
claim(
    "after the full training the clean accuracy is within three points of the plain model's",
    robust_acc.utility >= clean.value - 0.03,
    evidence=f"{robust_acc.utility:.3f} against {clean.value:.3f}, and {hardened_acc.utility:.3f} after 40 steps, n = {len(test)}",
)

# %% [markdown]
# On photographs the price is higher, ten points and more (see below). In this world shape and colour are enough to name an object, and
# both survive eight grey levels, so the robust features are also the accurate ones. Do not carry that over to real images.
#
# What has the robust model learned? Take the attack's change on both models for the same scenes, at three times the budget, on scenes where it succeeds against both.

# %%
wide = dict(eps=24 / 255, steps=40, random_start=False, early_removal=False)
chosen = Misclassified(test.labels[:48])
plain_run, robust_run = (pgd(m, few[:48], chosen, **wide) for m in (vit, robust))
both_won = plain_run.success & robust_run.success  # a failed item comes back unchanged
picture = few[:48][both_won]
on_plain = plain_run.images[both_won] - picture
on_robust = robust_run.images[both_won] - picture

# %%
magnified = [(0.5 + change[:8] * 4).clamp(0, 1) for change in (on_plain, on_robust)]
figures.show(
    figures.image_grid(
        [picture[:8], *magnified], row_labels=["original", "plain ViT", "vit-robust"]
    ),
    "fig-perturbations",
    caption="What PGD (eps 24/255, 40 steps) changes, magnified four times around grey. "
    "Against the plain ViT: fine noise. Against the robust one: patches of colour, "
    "several pixels wide.",
    alt="Three rows of eight pictures. The changes against the plain model are fine noise; "
    "those against the robust model are coarse blotches, several pixels wide.",
)

# %% [markdown]
# The eye can be fooled, so measure it: how much does a pixel's change agree with its right-hand neighbour's?


# %%
from safescale_lib.measure.intervals import bootstrap


def agreement(change):
    same = (change[..., 1:] * change[..., :-1]).sign() > 0  # (N, 3, S, S - 1)
    return bootstrap(same.float().mean(dim=(1, 2, 3)).numpy())


plain_scale, robust_scale = agreement(on_plain), agreement(on_robust)

# %%
claim(
    "the robust model is only fooled by coarser changes",
    robust_scale.low > plain_scale.high,
    evidence=f"neighbours that change alike: {plain_scale} plain, {robust_scale} robust, bootstrap over {len(picture)} scenes",
)

# %% [markdown]
# Fine noise no longer moves the robust model. To fool it the attacker must paint areas, which is closer to changing what the picture shows.
#
# ### The adaptive attack
#
# `vit-robust` was trained against a short PGD on cross-entropy and was just judged by nearly the same attack. An attacker who knows that
# does not stop there {cite}`tramer2020adaptive`. Three changes: more steps, several random starts, and a second objective,
# the *margin* between the best wrong logit and the right one, which does not fade when the model is sure of itself {cite}`carlini2017cw`.
# A scene counts as safe only if it survives all of them.

# %%
from safescale_lib.search.objectives import margin

strong = dict(steps=25, step_size=2 / 255)
runs_r = side_by_side(
    partial(attack, robust, 1, **strong),
    partial(attack, robust, 2, objective=margin, **strong),
)
runs_r.append(held["vit-robust"])  # and the plain PGD-20 from above
survivors = torch.stack([run.survived for run in runs_r]).all(0).numpy()
spent = runs_r[0].cost + runs_r[1].cost + runs_r[2].cost

# %% [markdown]
# Put the verdicts together: the worst case per scene, and the cost of all three runs.

# %%
adaptive = Outcome(
    ATTACK, "adaptive: PGD-25 from another start, then on the margin; worst case", "robust accuracy",
    rate(survivors), robust_acc.control, robust_acc.utility, DEFENSE, spent, 1, survivors,
)  # fmt: skip
adaptive

# %%
claim(
    "under its adaptive attack the defense still stands",
    adaptive > pgd_acc,
    adaptive > 0.7,
)

# %% [markdown]
# This number, not the one before, is the headline of the defense. It lies close to the first: this defense does not hide anything from the
# attacker. Now sweep the budget on both models.

# %%
both = {
    "plain ViT": curves["PGD-20"],
    "vit-robust": sweep(pgd, robust, generator=seeded(0)),
}

# %%
figures.show(
    figures.curves(both, levels, **AXES),
    "fig-defended",
    caption="Robust accuracy under PGD-20 against the budget, with 95 % intervals. The robust model was trained at 8.",
    alt="Two curves. The plain model falls to zero by 16 grey levels; the robust one stays high up to 8, the budget it "
    "was trained for, and falls beyond.",
)

# %% [markdown]
# Robustness ends soon after the budget it was trained for. A defense is a statement about a threat model, never about "attacks".

# %% [markdown]
# ## A defense that only hides
#
# Here is a simpler idea. Small changes should vanish if the model sees coarse pixels only: round each channel to eight levels
# before the model looks {cite}`xu2018squeezing`. No training, one line.

# %% tags=["nbval-check-output"]
figures.source(quantised_input)

# %%
LEVELS = 8
coarse = quantised_input(vit, levels=LEVELS)
squeezed = dict(
    technique="vfm.vit.adversarial_defense",
    method="quantised input, under white-box PGD-20",
    clean=accuracy(coarse, few),
)
whites = side_by_side(*(partial(attack, coarse, seed, few) for seed in (0, 1, 2)))
white_accs = [
    robust_accuracy(a, **squeezed, seed=seed) for seed, a in enumerate(whites)
]
Outcomes("Eight grey levels under the strongest attack so far", white_accs)

# %% [markdown]
# Nearly perfect, better than adversarial training, and free. **Stop here and predict:** what would you check before you publish this?
#
# A white-box attacker knows more than any other, so a weaker attacker must not do better. Try one: make the pictures against the *undefended*
# ViT and show them to the defended one, without another look at it {cite}`papernot2017practical`. Here the surrogate is the very network behind the
# rounding, the easiest case; an attacker without it would train one of their own.

# %%
squeezed |= dict(technique=ATTACK, against="vfm.vit.adversarial_defense")
squeezed["method"] = "transfer of PGD-20 from the plain ViT"
made_on = partial(attack, vit, images=few, early_removal=False)
surrogates = side_by_side(*(partial(made_on, seed=seed) for seed in (0, 1, 2)))
moved = [pixels.replay(coarse, made, few, few_wrong) for made in surrogates]
transfer_accs = [
    robust_accuracy(a, **squeezed, seed=seed) for seed, a in enumerate(moved)
]
Outcomes("The same defense under a transfer attack", transfer_accs)

# %%
claim(
    "a black-box transfer is stronger than the white-box attack: the gradient is masked",
    transfer_accs[0] < white_accs[0],
)

# %% [markdown]
# That order is impossible for an honest gradient. Rounding is flat almost everywhere, so its derivative is zero and PGD stood still at its
# random start. Nothing was robust; the attack was blind {cite}`athalye2018obfuscated`.
#
# The cure for the attacker: run the rounding forwards and pretend on the way back that it was not there. This is *backward pass
# differentiable approximation* (BPDA) in its simplest form.

# %% tags=["nbval-check-output"]
from safescale_lib.search.models import straight_through
from safescale_lib.vfm.vit import quantise

figures.source(straight_through)

# %%
open_ = straight_through(vit, lambda x: quantise(x, LEVELS))
squeezed["method"] = "adaptive: PGD-20 through the rounding (BPDA)"
crafted = side_by_side(*(partial(attack, open_, seed, few) for seed in (0, 1, 2)))
judged = [pixels.replay(coarse, made, few, few_wrong) for made in crafted]
bpda_accs = [robust_accuracy(a, **squeezed, seed=seed) for seed, a in enumerate(judged)]
Outcomes("The adaptive attack on quantised input", bpda_accs)

# %%
claim(
    "the adaptive attack breaks most of what seemed safe",
    bpda_accs[0] < white_accs[0],
    bpda_accs[0] < 0.5,
)

# %% [markdown]
# Side by side, with the control:

# %%
noise_c = random_noise(coarse, few, few_wrong, eps=EPS, tries=20, generator=seeded(0))
bars = {
    "no attack": rate((coarse(few).argmax(-1) == test.labels[:100]).numpy()),
    "random noise": rate(noise_c.survived.numpy()),
    "white-box PGD": white_accs[0].measured,
    "transfer": transfer_accs[0].measured,
    "adaptive (BPDA)": bpda_accs[0].measured,
}


# %%
figures.show(
    figures.bars(bars, xlabel="accuracy of the quantised model"),
    "fig-masked",
    caption="One defense, five judges, the same scenes, 95 % intervals, eps 8/255. The white-box attack alone would have called it solved.",
    alt="Horizontal bars of accuracy: near one without attack, under random noise and under white-box PGD; far "
    "lower under transfer and under the adaptive attack.",
)

# %% [markdown]
# Keep a short list for your own work {cite}`carlini2019evaluating`. Suspect masked gradients when a black-box attack beats a white-box one,
# when an unlimited budget does not reach zero, when iterating does not beat a single step, or when random search finds what gradients miss.

# %%
endless = pgd(
    coarse,
    few,
    few_wrong,
    eps=1.0,
    steps=20,
    step_size=1 / 255,
    generator=seeded(0),
    random_start=False,
)
through = pgd(open_, few, few_wrong, eps=1.0, steps=40, generator=seeded(0))
claim(
    "with an unlimited budget the blind attack still fails, the adaptive one always wins",
    bool(endless.success.sum() == 0) and bool(through.survived.sum() == 0),
    evidence=f"broken: {int(endless.success.sum())} blind, {int(through.success.sum())} adaptive, of {int(through.attempted.sum())}",
)

# %% [markdown]
# ## At full scale
#
# What you measured carries over in kind, not in number.
#
# - **The attack is as strong.** RobustBench lists a standard WideResNet on CIFAR-10 with 94.78 % clean and 0.00 % robust accuracy at eps 8/255
#   {cite}`croce2021robustbench`. A ViT is no safer by birth: whether it looks more robust than a convolutional network depends on
#   how the two were trained {cite}`bai2021transformers,shao2022vitrobust`.
# - **Adversarial training helps and costs more.** On ImageNet at eps 4/255 under AutoAttack {cite}`croce2020autoattack`, a ViT-S with a convolutional stem reaches 72.5 % clean
#   and 48.1 % robust accuracy after 300 epochs, a ViT-B 76.3 % and 54.7 % {cite}`singh2023revisiting`. ViTs have recipes of their own: a gentler
#   augmentation and warm-up {cite}`debenedetti2023light`, or dropping attention and masking perturbations during training {cite}`mo2022ardprm`.
# - **Hiding is common.** Of nine defenses published at one conference, seven relied on masked gradients; six fell completely to adaptive attacks
#   and one partly {cite}`athalye2018obfuscated`.
#
# The code above asks nothing of the size. `zoo.load("vit", checkpoint=...)` reads any image classifier in Hugging Face layout, and a test of this book
# runs the same attack on a full-size ViT-B/16.

# %% [markdown]
# ## Exercises
#
# ### Exercise 2.1: write FGSM yourself (easy, 10 minutes)
#
# Complete the function. It takes pixels in [0, 1] and returns attacked pixels in [0, 1], at most eps away. Then run the check.


# %%
def my_fgsm(
    model, images: torch.Tensor, labels: torch.Tensor, eps: float
) -> torch.Tensor:
    """images (B, 3, S, S) -> attacked images (B, 3, S, S)."""
    attacked = images.clone()  # replace this line
    return attacked


# %%
def check_fgsm(answer) -> str:
    mine, sure = (
        answer(vit, few, test.labels[:100], EPS),
        fgsm(vit, few, few_wrong, eps=EPS, grid=None),
    )
    if mine.shape != few.shape or mine.min() < 0 or mine.max() > 1:
        return "not yet: keep the shape and stay in [0, 1]"
    if (mine - few).abs().max() > EPS + 1e-6:
        return "not yet: a pixel moved further than eps"
    broken = (vit(mine).argmax(-1) != test.labels[:100])[sure.attempted]
    same = (broken == sure.success[sure.attempted]).float().mean()
    return (
        "correct"
        if same > 0.99
        else f"not yet: agrees with FGSM on {same:.0%} of the scenes"
    )


check_fgsm(my_fgsm)

# %% [markdown]
# <details><summary>Hint</summary>
#
# You need the gradient of the cross-entropy with respect to the *pixels*: `images.clone().requires_grad_(True)`, then `torch.autograd.grad`.
# If the check says that a pixel moved too far, you probably forgot the sign.
#
# </details>
#
# The solution is folded below.


# %% tags=["hide-cell"]
def solved_fgsm(model, images, labels, eps):
    x = images.clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(model(x), labels)
    (gradient,) = torch.autograd.grad(loss, x)
    return (images + eps * gradient.sign()).clamp(0, 1)


assert check_fgsm(solved_fgsm) == "correct"
check_fgsm(solved_fgsm)

# %% [markdown]
# ### Exercise 2.2: one bit a channel (medium, 20 minutes, measure)
#
# With `levels=2` the model sees one bit a channel. Is that masking again, or is some of it real? Measure clean accuracy, transfer and BPDA
# for 2, 4 and 8 levels on `few`, and decide. *Predict first:* which will be hardest to break, and why?
#
# <details><summary>Hint</summary>
#
# With L levels the rounding thresholds lie 255/(L - 1) grey levels apart. How likely is it that eight grey levels carry a pixel across one, if the pixel is dark background?
#
# </details>


# %% tags=["hide-cell"]
def bits(levels):
    model, through = (
        quantised_input(vit, levels=levels),
        straight_through(vit, lambda x: quantise(x, levels)),
    )
    crafted = pgd(through, few, few_wrong, eps=EPS, steps=20, generator=seeded(0))
    shown = (few, surrogates[0].images, crafted.images)
    return [
        rate((model(images).argmax(-1) == test.labels[:100]).numpy())
        for images in shown
    ]


jobs = [partial(bits, levels) for levels in (2, 4, 8)]
answers = dict(zip((2, 4, 8), side_by_side(*jobs), strict=True))
table(
    f"Quantised input, {len(few)} scenes",
    ["levels", "clean", "transfer", "BPDA"],
    [(k, *v) for k, v in answers.items()],
)

# %% tags=["hide-cell"]
claim(
    "one bit is worth something: it keeps more under the adaptive attack than eight levels do",
    answers[2][2].low > answers[8][2].high,
    evidence=f"{answers[2][2]} at 2 levels, {answers[8][2]} at 8, n = {len(few)} each",
)

# %% [markdown]
# ## The rest of the toolbox
#
# PGD answers one question: does a gradient break this item within eps? Four other questions need other searches. *Was PGD badly
# tuned?* (Auto-PGD {cite}`croce2020autoattack`.) *How far is each item from breaking?* (Carlini and Wagner {cite}`carlini2017cw`.) *What if
# there is no gradient?* (Square {cite}`andriushchenko2020square`, HopSkipJump {cite}`chen2020hopskipjump`.) *What if one change must
# serve every picture?* (The adversarial patch {cite}`brown2017patch`, the universal perturbation {cite}`moosavi2017universal`.)
#
# None of them knows that the victim is a ViT. That is why they are baselines: an attack made for the ViT has to beat them. The victim, the scenes
# and the criterion are the same as before; smaller subsets keep the section short.

# %%
from safescale_lib.measure import smoothing
from safescale_lib.measure.costs import Cost
from safescale_lib.search import auto, minimal, patches, queries


def part(n):
    """The first n test scenes with their criterion."""
    return test.images[:n], Misclassified(test.labels[:n])


def clean_on(n, model=vit):
    return float((model(test.images[:n]).argmax(-1) == test.labels[:n]).float().mean())


def standing(found, method, seed=0, model=vit, **other):
    known = dict(technique=ATTACK, clean=clean_on(len(found.success), model), seed=seed)
    return robust_accuracy(found, **known | other | {"method": method})


# %% [markdown]
# ### No knobs, and no eps
#
# Auto-PGD sets its own step size: it starts at twice eps and halves where an item stalls. The minimal attacks drop eps altogether and ask for
# the *smallest* change. Carlini and Wagner weigh the distance against the missing margin,
#
# $$ \min_\delta \; \|\delta\|_2^2 + c \cdot \max\big(0, \; z_y - \max_{i \ne y} z_i\big), $$
#
# and search $c$ for each item. A later search asks something simpler {cite}`rony2019ddn`: walk on a sphere around the picture, shrink it after a success, grow
# it after a failure. Ours uses the second as a head start for the first.

# %% tags=["nbval-check-output"]
figures.source(minimal._shrink_radius)

# %%
images, wrong_few = part(100)
adaptive_steps, nearest = side_by_side(
    partial(auto.apgd, vit, images, wrong_few, eps=EPS, steps=20, generator=seeded(0)),
    partial(minimal.carlini_wagner, vit, images, wrong_few),
)
apgd_acc = standing(adaptive_steps, "Auto-PGD-20, eps 8/255")

# %%
claim(
    "the minimal attack breaks every scene it tries, and most of them closer than L2 distance 1",
    bool(nearest.success[nearest.attempted].all()),
    float(nearest.distance[nearest.success].median()) < 1,
    evidence=f"{int(nearest.success.sum())} of {int(nearest.attempted.sum())} scenes, "
    f"L2 distance {bootstrap(nearest.distance[nearest.success].numpy())}",
)

# %% [markdown]
# A distance is a better number than a rate: nobody had to choose an eps. But it is easy to report too small a distance. A minimal attack stops right at
# the decision boundary, and a saved picture has only 256 levels a channel. Search in raw floats, save the result, and ask again.


# %%
def saved(pictures):
    """What an 8-bit file keeps of pictures in [0, 1]."""
    return (pictures * 255).round() / 255


raw = minimal.carlini_wagner(vit, *part(60), grid=None)
still = (vit(saved(raw.images)).argmax(-1) != test.labels[:60])[raw.success]

# %%
claim(
    "many raw-float successes at the boundary are gone once the picture is saved",
    rate(still.numpy()).high < 0.9,
    evidence=f"raw floats: {int(raw.success.sum())} successes, share that survives saving {rate(still.numpy())}",
)

# %% [markdown]
# Two habits follow, and both concern any attack library you use. Ask your own criterion about the pictures that come back, in the form in which
# they will be used: some libraries return their best try whether or not it succeeded. And let a failed item come back as its original; otherwise its
# distance, the distance of a *failure*, slips into the mean. Here the model sees 8-bit pictures during the search, so nothing is lost afterwards.
#
# ### No gradient: scores, then labels
#
# Behind an interface the attacker sees only answers, and pays for each. Square paints random squares in the most extreme colours the budget allows and
# keeps those that shrink the margin. The control paints random corners of the ball and learns nothing. The first job is told after them.

# %%
images, wrong_few = part(50)
budget = dict(eps=2 * EPS, queries=300)
blind, scored, guessed = side_by_side(
    lambda: queries.hop_skip_jump(vit, *part(24), queries=500, generator=seeded(0)),
    lambda: queries.square(vit, images, wrong_few, **budget, generator=seeded(0)),
    lambda: queries.random_guesses(
        vit, images, wrong_few, **budget, generator=seeded(0)
    ),
)
square_acc = standing(scored, "Square, 300 queries, eps 16/255")
guess_acc = standing(guessed, "random guesses, 300 queries, eps 16/255")
claim("Square finds with scores what blind guesses miss", square_acc < guess_acc)

# %%
asked = [1, 10, 30, 100, 200, 300]


def left(found):
    return [rate((~found.broken_within(q))[found.attempted].numpy()) for q in asked]


lines = {"random guesses": left(guessed), "Square": left(scored)}
figures.show(
    figures.curves(
        lines, asked, xlabel="queries for each scene", ylabel="share still right"
    ),
    "fig-square",
    caption="Share of the scenes that stand after so many queries, eps 16/255, with 95 % intervals. Guesses do not add up; "
    "kept squares do.",
    alt="Two curves over the number of queries. Random guesses stay near one; Square falls steadily and breaks most scenes.",
)

# %% [markdown]
# A curve says more than a rate at one budget: it shows what the next hundred queries buy. With *labels* alone there is no margin to watch. HopSkipJump (`blind`)
# starts from any picture that is wrong, here pure noise, and walks along the decision boundary towards the scene: bisect to the boundary, feel its
# slope from the labels of random neighbours, jump, repeat.

# %%
way = blind.trace[:, blind.success].mean(1)
claim(
    "by labels alone the distance shrinks to less than half of where it began",
    float(way[-1]) < 0.5 * float(way[0]),
    evidence="mean L2 distance after each round: " + ", ".join(f"{d:.1f}" for d in way),
)

# %% [markdown]
# It always has a success in hand, since it begins with one. What queries buy is nearness, and after a few hundred of them the change is still
# plain to see. Papers spend thousands.
#
# ### One change for all
#
# Now the attacker computes once and attacks for free. A universal perturbation is one faint pattern for all scenes; a patch may be anything
# inside its square, and must work wherever it is stuck. Both are computed on *training* scenes and judged on test scenes, with a random
# pattern and a random patch of the same budget beside them.

# %%
own = scenes(256, split="train", seed=77)
own_wrong = Misclassified(own.labels)
images, wrong_few = part(len(test))
SIZE = 12
known = (vit, own.images, own_wrong)
spreading, sticking = side_by_side(
    lambda: patches.universal_perturbation(
        *known, eps=2 * EPS, steps=60, generator=seeded(0)
    ),
    lambda: patches.adversarial_patch(*known, size=SIZE, steps=60, generator=seeded(0)),
)
pattern, sticker = spreading.delta, sticking.patch

# %%
corner = 2 * EPS * (2 * torch.rand(3, 32, 32, generator=seeded(1)).round() - 1)
spread = {
    name: patches.add_universal(vit, delta, images, wrong_few, eps=2 * EPS)
    for name, delta in (("universal", pattern), ("random", corner))
}
confetti = saved(torch.rand(3, SIZE, SIZE, generator=seeded(1)))
stuck = {
    name: patches.stick(vit, patch, images, wrong_few, generator=seeded(2))
    for name, patch in (("optimised", sticker), ("random", confetti))
}

# %%
gone = (spread["universal"].success & stuck["optimised"].success).nonzero()[:7, 0]
shown = torch.cat(
    [(0.5 + pattern / (4 * EPS))[None].clamp(0, 1), spread["universal"].images[gone]]
)
board = torch.full((1, 3, 32, 32), 0.5)
corner_of = torch.tensor([[10, 10]])
worn = torch.cat(
    [patches.paste(board, sticker, corner_of), stuck["optimised"].images[gone]]
)


def called(pictures, first):
    return [first, *(KINDS[k] for k in vit(pictures[1:]).argmax(-1))]


figures.show(
    figures.image_grid(
        [shown, worn],
        [called(shown, "pattern"), called(worn, "patch")],
        row_labels=["universal", "patch"],
    ),
    "fig-universal",
    caption="Left: the universal perturbation, magnified around grey, and the patch, both computed on other scenes. Right: test "
    "scenes that wear them, with the class the ViT sees.",
    alt="Two rows. First a noise pattern and seven scenes under it, then a coloured square and the same scenes with the "
    "square stuck on them at various places; all answers are wrong.",
)

# %% [markdown]
# The objects can still be named by you, unless the patch sits on them. Random patches cover objects too, so only the difference to the random patch
# is the attack's own merit.

# %%
universal_acc, corner_acc = (
    standing(spread[k], f"{k} perturbation, eps 16/255")
    for k in ("universal", "random")
)
patch_acc, confetti_acc = (
    standing(stuck[k], f"{k} patch, {SIZE} x {SIZE} pixels, any place")
    for k in ("optimised", "random")
)

# %%
claim(
    "one pattern, and one patch, break what a random pattern and a random patch do not",
    universal_acc < corner_acc,
    patch_acc < confetti_acc,
)

# %% [markdown]
# Here is everything in one table. Mind the columns: each attack has its own budget, so rows compare with their control and not with one another.


# %%
def mean_distance(found, method):
    far = bootstrap(found.distance[found.success].numpy())
    kept = clean_on(len(found.success))
    return Outcome(
        ATTACK, method, "mean L2 distance", far, utility=kept, cost=found.cost, seed=0
    )


Outcomes(
    "The toolbox against the plain ViT",
    [
        apgd_acc,
        mean_distance(nearest, "Carlini-Wagner, all broken"),
        square_acc,
        guess_acc,
        mean_distance(blind, "HopSkipJump, 500 queries, all broken"),
        universal_acc,
        corner_acc,
        patch_acc,
        confetti_acc,
    ],
)

# %% [markdown]
# ### The last word: the worst case over several
#
# A defense may be strong against one search and weak against another. So run several and count an item as robust only if *all* of them failed. Later members
# see only what the earlier ones left, which makes the ensemble cheap. The loss of its middle members deserves a look: the difference of logits
# ratio divides the margin by a gap inside the answer itself, so that no scaling of the logits can hide the gradient.

# %% tags=["nbval-check-output"]
figures.source(auto.dlr)

# %%
images, wrong_few = part(80)
worst = auto.auto_ensemble(
    robust,
    images,
    wrong_few,
    eps=EPS,
    steps=20,
    targets=2,
    queries=60,
    generator=seeded(0),
)
single = pgd(robust, images, wrong_few, eps=EPS, steps=20, generator=seeded(0))
rows = [
    (name, int((worst.broken_by == k).sum())) for k, name in enumerate(worst.members)
]
table("Who broke what on vit-robust", ["member, in order", "scenes broken"], rows)

# %%
pair = [
    standing(single, "vit-robust, PGD-20", model=robust),
    standing(
        worst, "vit-robust, ensemble", model=robust,
        against="vfm.vit.adversarial_defense.adversarial_training",
    ),
]  # fmt: skip
Outcomes("One attack and the worst case of several", pair)

# %%
lost = int(single.survived.sum() - worst.survived.sum())
claim(
    "the ensemble finds little that PGD missed: this defense does not hide its gradient",
    -1 <= lost <= 8,
    evidence=f"{lost} more scenes broken than by PGD-20, n = {len(images)}",
)

# %% [markdown]
# That agreement is the good news. On the quantised input of this chapter the two would part company: APGD sees no gradient there, Square needs none.
#
# ### A proof instead of an attack
#
# Every number so far is an upper bound: a better attack may come. Randomised smoothing {cite}`cohen2019smoothing` gives a *lower* bound. Ask the model about
# many copies of the picture under Gaussian noise $\sigma$ and answer with the majority. If the majority's share is at least $p$ with
# confidence $1 - \alpha$, no change shorter than
#
# $$ R = \sigma \, \Phi^{-1}(p) $$
#
# in L2 can alter the answer, whoever computes it. The base model should know noise, so fine-tune a copy on noisy scenes first. While that trains, certify
# the plain ViT for comparison.

# %%
import copy

from safescale_lib.zoo.training import fit

SIGMA = 0.3
base = copy.deepcopy(vit)
images, wrong_few = part(40)


def noisy_loss(step):
    batch = scenes(64, split="train", seed=step)
    noise = SIGMA * torch.randn(batch.images.shape, generator=seeded(step))
    return torch.nn.functional.cross_entropy(base(batch.images + noise), batch.labels)


def certified(model):
    return smoothing.certify(model, images, sigma=SIGMA, n=200, generator=seeded(0))


_, plain_proof = side_by_side(
    lambda: fit(base, noisy_loss, steps=80, lr=1e-3, warmup=10, progress=False),
    lambda: certified(vit),
)
base = base.eval()
defended = smoothing.smoothed(base, sigma=SIGMA, n=48)

# %% [markdown]
# Certify it, and attack what is certified. Votes carry no gradient, so the adaptive attack climbs the mean softmax over noisy copies and is judged on the votes.

# %%
radii = [0, 0.2, 0.3, 0.5, 1.0]


def against_votes(radius):
    soft = smoothing.expected(base, sigma=SIGMA, n=4)
    budget = dict(
        eps=radius, norm="l2", steps=10, early_removal=False, random_start=False
    )
    crafted = pgd(soft, images, wrong_few, batch_size=64, **budget)
    return pixels.replay(defended, crafted, images, wrong_few, norm="l2")


proof, *attacked = side_by_side(
    partial(certified, base), *(partial(against_votes, radius) for radius in radii)
)
labels = test.labels[:40]
bounds = {
    f"certified, {name}": [rate(p.correct_at(labels, r).numpy()) for r in radii]
    for name, p in (("plain ViT", plain_proof), ("after noisy scenes", proof))
} | {"attacked, after noisy scenes": [rate(a.survived.numpy()) for a in attacked]}

# %%
figures.show(
    figures.curves(bounds, radii, xlabel="L2 radius", ylabel="accuracy"),
    "fig-certified",
    caption="Certified accuracy (no attack can go below) and accuracy under the adaptive attack (no defense can claim more), "
    "40 scenes, with 95 % intervals. The truth lies between the last two curves.",
    alt="Three curves over the L2 radius. Both certified curves fall to zero where 200 votes cannot prove more; the attacked "
    "curve lies above them throughout and falls later.",
)

# %%
gaps = [
    a.survived.float().mean() - proof.correct_at(labels, r).float().mean()
    for a, r in zip(attacked, radii, strict=True)
]

# %%
claim(
    "no attack beats the proof: accuracy under attack never falls below certified accuracy",
    all(gap >= 0 for gap in gaps),
    evidence=f"attacked minus certified at each radius: {', '.join(f'{g:.2f}' for g in gaps)}",
)

# %%
SMOOTH = "vfm.vit.adversarial_defense"
kept = clean_on(40, defended)
budget = dict(eps=1.0, norm="l2", steps=10, random_start=False)
plain = standing(pgd(vit, images, wrong_few, **budget), "plain ViT, PGD-10, L2 1.0")
smooth = standing(
    attacked[radii.index(1.0)], "smoothed, adaptive PGD-10, L2 1.0",
    technique=SMOOTH, clean=kept, against=SMOOTH, trained=True,
)  # fmt: skip
proved = Outcome(
    SMOOTH, "smoothed, certified at L2 0.3", "certified accuracy",
    bounds["certified, after noisy scenes"][radii.index(0.3)],
    control=kept, utility=kept, cost=Cost(queries=250 * 40), seed=0, trained=True,
)  # fmt: skip
Outcomes("Smoothing: attacked and proved", [plain, smooth, proved])

# %%
claim(
    "smoothing keeps more than the plain ViT under an attack made for it",
    smooth > plain,
)

# %% [markdown]
# Smoothing is paid for in clean accuracy: compare the utilities. The curve of the proof ends abruptly: with $n$ votes, even if all agree, the bound on $p$ stays below one, and so does the radius. A hundred times the votes
# buys little; a larger $\sigma$ buys radius and pays with accuracy. On ImageNet, papers certify about half of the pictures at L2 radius 0.5
# {cite}`cohen2019smoothing`, with a hundred thousand votes each. In linf terms that is far less than one grey level a pixel: a proof covers much smaller changes than the
# attacks of this chapter use.
#
# ### Exercise 2.3: how far does the vote carry? (easy, 10 minutes)
#
# Of `n` noisy copies, `hits` voted for the answer. Return the certified radius, 0 to abstain. `scipy.stats` has what you need: an exact one-sided interval
# for a share, and the inverse of the normal distribution.


# %%
def my_radius(hits: int, n: int, sigma: float, alpha: float) -> float:
    """L2 radius certified with error probability alpha; 0.0 where the votes do not suffice."""
    return sigma  # replace this line


# %%
def check_radius(answer) -> str:
    """A classifier that says yes while one pixel is below 0.5: its true radius is known."""
    for level in (0.0, 0.2, 0.4, 0.499):
        votes = 0.3 * torch.randn(400, generator=seeded(3)) + level < 0.5
        mine = answer(int(votes.sum()), 400, 0.3, 0.01)
        if mine > 0.5 - level + 1e-6:
            return (
                f"not yet: {mine:.3f} is more than the true distance {0.5 - level:.3f}"
            )
        bound = smoothing.lower_bound(int(votes.sum()), 400, 0.01)
        if bound > 0.5 and mine < 0.5 * 0.3 * (bound - 0.5):
            return "not yet: the votes prove more than that"
        if bound <= 0.5 and mine != 0:
            return "not yet: abstain when the bound does not reach one half"
    return "correct"


check_radius(my_radius)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `scipy.stats.binomtest(hits, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low` is the lower bound on the share. Compare it with one half first,
# then send it through `scipy.stats.norm.ppf`.
#
# </details>


# %% tags=["hide-cell"]
from scipy import stats


def solved_radius(hits, n, sigma, alpha):
    test_of = stats.binomtest(hits, n, alternative="greater")
    low = test_of.proportion_ci(1 - alpha, method="exact").low
    return float(sigma * stats.norm.ppf(low)) if low > 0.5 else 0.0


assert check_radius(solved_radius) == "correct"
assert check_radius(my_radius) != "correct"
check_radius(solved_radius)

# %% [markdown]
# ## Survey 2.1: attacks that only a ViT invites
#
# PGD treats a ViT as a black box with a gradient. But a ViT has an inside that a convolutional network lacks: a grid of patches, a
# table of position embeddings, and attention, through which each patch may speak to every other. The survey's attacks pull these handles.
#
# | | |
# |---|---|
# | **Goal** | untargeted: any wrong class will do |
# | **Knowledge** | four attacks are white-box and read attention, tokens and position table; the transfer attack owns another model; the query attack sees labels only |
# | **Access** | some patches of the input, all of it, or a stream of questions |
# | **Budget** | differs from row to row: *how many patches* may hold anything at all, or how far every pixel may move, or how many questions are asked |
#
# A patch that holds anything at all is a sticker on a sign. It is plain to see, but it is easy to print.

# %%
from safescale_lib.vfm.vit import inside, patch_fool

with torch.no_grad(), inside.attending(vit) as attention:
    vit(few)
maps = attention.maps  # per layer (N, heads, 17 queries, 17 keys)
received = maps[1].mean((1, 2))[:, 1:]  # (N, 16): what each patch gets
f"{len(maps)} layers, each {tuple(maps[0].shape)}"

# %% [markdown]
# Token 0 is the class token; the other sixteen are the patches, row by row. Average the attention that a patch receives and draw it on the picture.
# **Patch-Fool** {cite}`fu2022patchfool` attacks the brightest cell: what many tokens listen to can mislead many tokens. Inside that one patch it
# may write anything.

# %% tags=["nbval-check-output"]
figures.source(patch_fool)

# %% [markdown]
# The loss is cross-entropy plus a little of the attention paid to the attacked patch in each layer. Beside the attack run its two controls: random content in
# the same patch, and the same search in a patch drawn by lot.


# %%
def fooled(name, key, method, model=vit, seeds=(0,), **budget):
    """Run a patch attack of the library on `few`; one outcome a seed."""
    base = float((model(few).argmax(-1) == few_wrong.labels).float().mean())
    budget = {"steps": 30, "batch_size": 100, **budget}
    jobs = [  # each with a model of its own: its attention is listened to
        partial(name, copy.deepcopy(model), few, few_wrong, generator=seeded(s), **budget)
        for s in seeds
    ]  # fmt: skip
    runs = side_by_side(*jobs)
    labels = dict(technique=f"{ATTACK}.{key}", method=method, clean=base)
    return runs[0], [
        robust_accuracy(r, **labels, seed=s) for s, r in zip(seeds, runs, strict=True)
    ]


# %%
sticker, patch_accs = fooled(
    patch_fool, "patch", "Patch-Fool, 1 of 16 patches", seeds=(0, 1, 2)
)
_, lottery = fooled(
    patch_fool, "patch", "the same in a random patch", seeds=(0, 1, 2), by="random"
)
patched = partial(fooled, patch_fool, "patch")
(_, steepest), (_, scribble) = side_by_side(
    partial(patched, "the same in the steepest patch", by="gradient"),
    partial(patched, "random content, best of 20", steps=0, restarts=20),
)
Outcomes("One patch, anything inside", [*patch_accs, *lottery, *steepest, *scribble])

# %% [markdown]
# Read the table in blocks of seeds. One patch of sixteen is enough for most scenes. Scribbling is not enough: it is the search that finds what to
# write. The place matters less than you might expect: in this small world the object fills the picture, and a patch drawn by lot does as well as the most attended one.

# %%
claim(
    "one patch, searched for, breaks what twenty random fillings of it cannot",
    patch_accs[0] < scribble[0],
    patch_accs[0] < 0.5,
)


# %%
def lamp(images, weights):
    """The picture in grey, each patch (8 x 8 pixels) as bright as the attention it receives."""
    cells = (weights / weights.amax(1, keepdim=True)).reshape(-1, 1, 4, 4)
    light = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (0.3 * images.mean(1, keepdim=True) + 0.7 * light).repeat(1, 3, 1, 1)


shown = sticker.success.nonzero()[:7, 0]
plain_ones, patched = few[shown], sticker.images[shown]
with torch.no_grad(), inside.attending(vit) as attention:
    answers = vit(patched).argmax(-1)
after = attention.maps[1].mean((1, 2))[:, 1:]

# %%
true_kinds, seen_kinds = (
    [KINDS[k] for k in ks] for ks in (few_wrong.labels[shown], answers)
)
lit = lamp(plain_ones, received[shown]), lamp(patched, after)
figures.show(
    figures.image_grid(
        [plain_ones, lit[0], patched, lit[1]],
        [true_kinds, [""] * 7, seen_kinds, [""] * 7],
        row_labels=["original", "attention", "Patch-Fool", "attention"],
    ),
    "fig-patch-fool",
    caption="Scenes before and after Patch-Fool, and the attention each patch receives in the second layer (bright: much). "
    "One patch of each picture, the brightest, is rewritten; the words are the ViT's answers.",
    alt="Four rows of seven pictures: original scenes; the same in grey, lit by attention; the scenes "
    "with one square of coloured noise; their attention maps.",
)

# %% [markdown]
# Anybody sees the sticker, and anybody still names the object. The ViT does not. Look at the last row: the sticker is rarely the brightest cell any more. It does
# not shout louder than the patch it covers; it says something else.
#
# ### Does adversarial training help?
#
# `vit-robust` was trained against eight grey levels on every pixel. A sticker is another threat model: few pixels, any value.

# %%
_, robust_sticker = fooled(
    patch_fool, "patch", "Patch-Fool on vit-robust", model=robust, seeds=(0, 1, 2)
)
_, robust_steepest = fooled(
    patch_fool, "patch", "the steepest patch, vit-robust", model=robust, by="gradient"
)

# %%
Outcomes(
    "One patch against the adversarially trained ViT",
    [*robust_sticker, *robust_steepest],
)

# %%
claim(
    "robust against small changes everywhere is not robust against a large change in one place",
    robust_sticker[0] < 0.6,
    robust_steepest[0] < 0.4,
)

# %% [markdown]
# It helps a little while the attacker trusts attention. Let the attacker choose the place by gradient, and even that is gone. A defense holds for the threat it was made for.
#
# ### Attention-Fool: a corner that everybody listens to
#
# What if the attacker cannot choose the place? **Attention-Fool** {cite}`lovisotto2022attentionfool` takes a corner. A token that gets no attention gets no gradient either, because the
# softmax is flat there. So the attack pulls *before* the softmax: it raises the score $q \cdot k$ with which all queries meet the patch's key. Plain patch PGD in the same
# corner (the same function with `pull=0`) is the baseline.

# %%
from safescale_lib.vfm.vit import attention_fool

in_corner, three = partial(fooled, attention_fool, "attention"), (0, 1, 2)
(_, corner_accs), (_, corner_pgd), (_, corner_noise) = side_by_side(
    partial(in_corner, "Attention-Fool, corner patch", seeds=three),
    partial(in_corner, "patch PGD, corner", seeds=three, pull=0.0),
    partial(in_corner, "random content, best of 20", steps=0, restarts=20),
)

# %% [markdown]
# ### The position attack: a pattern is a table
#
# The first layer sees $W x_i + p_i$: patch $i$, embedded, plus the embedding of its position. Add the same pattern $d$ to *every* picture and it sees
#
# $$ W (x_i + d_i) + p_i = W x_i + (p_i + W d_i). $$
#
# A universal pattern is nothing but another position table. **PE-Attack** {cite}`gao2024peattack` distorts the position embeddings; here we
# write the distortion with pixels. *Displaced* pushes every position towards its neighbour's; the pattern is known in closed form and asks the rest of the
# network nothing. *Optimised* ascends the loss over the table, on other, unlabelled scenes.

# %%
import copy

from safescale_lib.vfm.vit import position_attack

others = scenes(100, split="validation", seed=3).images
wide = dict(eps=16 / 255)
searched = dict(crafting=others, steps=20, **wide)
optimised, steady, displaced = side_by_side(
    lambda: position_attack(vit, test.images, wrong, **searched),
    lambda: position_attack(robust, test.images, wrong, **searched),
    lambda: position_attack(vit, test.images, wrong, eps=24 / 255),
)
twin = copy.deepcopy(vit)  # the plain picture, another table
with torch.no_grad():
    inside.vit_inside(twin).embeddings.position_embeddings[0, 1:] += optimised.shift
by_table = accuracy(twin)
by_pattern = float(optimised.survived.float().mean())
f"accuracy with the pattern {by_pattern:.3f}, with the table {by_table:.3f}"

# %%
claim(
    "to the ViT the pattern on every picture and the shifted table are one and the same, but for clipping",
    abs(by_table - by_pattern) < 0.05,
    evidence=f"accuracy {by_pattern:.3f} and {by_table:.3f}, n = {len(test)}",
)

# %% [markdown]
# ### All six in one table
#
# Four siblings remain. The **token attack** {cite}`joshi2021tokenattacks` picks the k patches with the largest gradient and changes only those, by at most eps.
# **PNA and PatchOut** {cite}`wei2022pnapatchout` make examples on one ViT for another victim: no gradient through the attention maps, and a random two thirds of the patches
# shown a step. **Patch-wise removal** (PAR) {cite}`shi2022par` needs no gradient at all: it starts from noise that fools the model and takes it away patch by patch, coarse to
# fine, as long as the label stays wrong.

# %%
from safescale_lib.vfm.vit import patch_removal, token_attack

in_four = partial(fooled, token_attack, "token", tokens=4, **wide)
(_, tokens), (_, tokens_lot) = side_by_side(
    partial(in_four, "token attack, 4 of 16, eps 16/255"),
    partial(in_four, "4 random tokens, eps 16/255", by="random"),
)
asked = dict(eps=3.0, queries=120)
some, some_wrong = few[:50], Misclassified(few_wrong.labels[:50])
removing = partial(patch_removal, vit, some, some_wrong, **asked)
removal = side_by_side(
    *(partial(removing, sizes=s, generator=seeded(0)) for s in (None, [1], [32]))
)

# %% [markdown]
# For the transfer the ViT is the surrogate, and two victims stand for models behind a wall: a CNN, and a ViT with smaller patches (`vit-fine`). The baseline is the same search without its two
# tricks, momentum PGD {cite}`dong2018mifgsm`. All see 16/255, the paper's budget.

# %%
from safescale_lib.vfm.vit import pna_patchout

zoo_models = {"vit": vit, "vit-robust": robust}
zoo_models |= {name: zoo.load(name) for name in ("vit-fine", "cnn")}
PLAIN = dict(pay_no_attention=False, kept=1.0)


def transferred(surrogate, victim, seed=0, **other):
    """Made on one model of the zoo, judged by another."""
    return pna_patchout(
        zoo_models[victim], few, few_wrong, surrogate=zoo_models[surrogate],
        batch_size=100, generator=seeded(seed), **wide | other,
    )  # fmt: skip


tricks = {
    (victim, seed): transferred("vit", victim, seed)
    for victim in ("cnn", "vit-fine")
    for seed in (0, 1, 2)
}
plain = {victim: transferred("vit", victim, **PLAIN) for victim in ("cnn", "vit-fine")}

# %% [markdown]
# Now every leaf stands in one table, each beside its control. Lower is a stronger attack.


# %%
def outcome(attack, key, method, model=vit, images=few, goal=few_wrong, seed=None):
    base = float((model(images).argmax(-1) == goal.labels).float().mean())
    labels = dict(technique=f"{ATTACK}.{key}", method=method, clean=base, seed=seed)
    return robust_accuracy(attack, **labels)


flat = random_noise(vit, test.images, wrong, generator=seeded(0), **wide)
patterns = {
    "optimised pattern, eps 16/255": (optimised, vit),
    "displaced pattern, eps 24/255": (displaced, vit),
    "random noise, eps 16/255": (flat, vit),
    "optimised on vit-robust, eps 16/255": (steady, robust),
}
position = [
    outcome(a, "position_embedding", method, model, test.images, wrong)
    for method, (a, model) in patterns.items()
]

# %%
ways = ("PAR", "noise off pixel by pixel", "start noise alone")
asking = [
    outcome(
        a, "query_based", f"{way}, 120 queries, L2 3", vit, some, some_wrong, seed=0
    )
    for a, way in zip(removal, ways, strict=True)
]
carried = [
    outcome(a, "transfer_based", f"PNA + PatchOut, vit to {victim}", zoo_models[victim], seed=seed)
    for (victim, seed), a in tricks.items()
]  # fmt: skip
carried_plain = [
    outcome(a, "transfer_based", f"momentum PGD, vit to {victim}", zoo_models[victim])
    for victim, a in plain.items()
]

# %%
Outcomes(
    "The ViT's own attacks and their controls (robust accuracy)",
    [
        *patch_accs[:1], *scribble, *position, *corner_accs, *corner_pgd, *corner_noise,
        *tokens, *tokens_lot, *carried, *carried_plain, *asking,
    ],
)  # fmt: skip

# %% [markdown]
# Take the blocks one by one.
#
# - *Position*: one pattern, made without the test scenes and without a label, beats noise of the same size by far. PGD, made anew for each picture, does more damage with half
#   the budget; the pattern costs nothing once it is made. Against `vit-robust`, and made for it, the pattern comes to nothing.
# - *Attention*: the corner is a worse place than the most attended patch, and still mostly enough. What the pull adds here is small: four layers starve nobody of gradient.
# - *Token*: where to spend a small budget matters. The gradient knows.
# - *Transfer*: examples from one ViT carry over to another ViT, hardly to the CNN. The two tricks bring nothing at this budget.
# - *Queries*: labels alone suffice. Removing whole patches is what makes it quick; pixel by pixel the same questions achieve nothing.

# %%
ends = [float(a.trace[-1].median()) for a in removal]  # L2 distance still needed
noise_off = dict(zip(("PAR", "pixels", "start"), ends, strict=True))

# %%
claim(
    "each attack beats random change of the same budget",
    position[0] < position[2],
    corner_accs[0] < corner_noise[0],
    tokens[0] < tokens_lot[0],
    asking[0] < asking[2],
)

# %%
claim(
    "a pattern for all pictures is no match for PGD on each, even at twice the budget; and the robust table stands",
    pgd_acc < position[0],
    position[3] > position[0],
)

# %%
claim(
    "after the same number of questions, noise removed by patches is nearer to the picture than noise removed by pixels",
    noise_off["PAR"] < 0.5 * noise_off["pixels"],
    evidence="median L2 distance "
    + ", ".join(f"{v:.1f} ({k})" for k, v in noise_off.items())
    + f", n = {len(some)}",
)

# %% [markdown]
# ### How many tokens does it take?
#
# Spend the budget on few tokens or on many; choose them by gradient or by lot; and ask the robust model too.

# %%
counts = [0, 1, 2, 4, 8, 16]


def by_tokens(model, **other):
    images, goal = few[:64], Misclassified(few_wrong.labels[:64])
    settings = {"steps": 15, "generator": seeded(0), **other}
    model = copy.deepcopy(model)  # its attention is listened to
    runs = [token_attack(model, images, goal, tokens=k, **settings) for k in counts]
    return [rate(run.survived.numpy()) for run in runs]


jobs = {
    "by gradient, eps 16/255": partial(by_tokens, vit, **wide),
    "by lot, eps 16/255": partial(by_tokens, vit, by="random", **wide),
    "by gradient, any change": partial(by_tokens, vit),
    "vit-robust, any change": partial(by_tokens, robust),
}
series = dict(zip(jobs, side_by_side(*jobs.values()), strict=True))

# %%
drawn = figures.curves(
    series, counts, xlabel="attacked tokens of 16", ylabel="robust accuracy"
)
drawn.axes[0].legend(loc="upper right")
figures.show(
    drawn,
    "fig-tokens",
    caption="Robust accuracy against the number of attacked tokens, with 95 % intervals, 64 scenes. Free to write anything, the attack needs one or two, on either model.",
    alt="Four falling curves. With any change allowed both models drop to near zero at one or two tokens. With eps "
    "16/255 the curve chosen by gradient lies below that of random tokens; they meet at sixteen.",
)

# %%
small, lot = series["by gradient, eps 16/255"], series["by lot, eps 16/255"]
claim(
    "the choice of tokens counts while they are few, and cannot count when all are taken",
    small[3].value < lot[3].value and abs(small[5].value - lot[5].value) < 0.1,
    evidence=f"4 tokens: {small[3]} against {lot[3]}; 16 tokens: {small[5]} against {lot[5]}",
)

# %% [markdown]
# ### Who fools whom
#
# A better surrogate may do what better tricks did not. Take `vit-robust`: its gradients are coarser and more about the object (look back at the picture of
# its perturbations). Craft on it and on the plain ViT, at 24/255, and try every model. One cell is white-box.

# %%
import numpy as np

surrogate_names, victim_names = ("vit", "vit-robust"), ("vit", "vit-fine", "cnn")
wider = dict(eps=24 / 255)


def matrix(**other):
    """(surrogates, victims) success rate among scenes the victim had right."""
    cells = [transferred(s, v, **other) for s in surrogate_names for v in victim_names]
    wins = [float(a.success.sum() / a.attempted.sum()) for a in cells]
    return np.reshape(wins, (len(surrogate_names), len(victim_names)))


# %%
static = [
    random_noise(zoo_models[v], few, few_wrong, generator=seeded(0), **wider)
    for v in victim_names
]
panels = {
    "PNA + PatchOut": matrix(**wider),
    "momentum PGD": matrix(**PLAIN, **wider),
    "random noise": np.array([[float(a.success.float().mean()) for a in static]]),
}

# %%
import matplotlib.pyplot as plt

with figures.style():
    drawn, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    for axis, (title, rates) in zip(axes, panels.items(), strict=True):
        axis.imshow(rates, vmin=0, vmax=1, cmap="cividis")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(3), victim_names, fontsize=9)
        rows_of = surrogate_names if len(rates) > 1 else ("no model",)
        axis.set_yticks(range(len(rates)), rows_of, fontsize=9)
        axis.set(xlabel="victim", ylabel="made on")
        axis.grid(visible=False)
        for (i, j), value in np.ndenumerate(rates):
            ink = "black" if value > 0.5 else "white"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink)

# %%
figures.show(
    drawn,
    "fig-transfer",
    caption="Attack success rate at eps 24/255, made on one model and shown to another. Left: PNA and PatchOut. "
    "Middle: the baseline. Right: the control. The robust surrogate carries further, to the CNN too.",
    alt="Three heat maps. On the ViT itself nearly every attack succeeds; from ViT to the finer ViT about half, to the CNN fewer, but more from the robust "
    "surrogate; noise almost never.",
)

# %%
middle = panels["momentum PGD"]
claim(
    "what is made on the ViT fools the other ViT more often than the CNN, and the robust surrogate reaches the CNN more often",
    bool(middle[0, 1] > middle[0, 2]) and bool(middle[1, 2] > middle[0, 2]),
    evidence=f"from vit {middle[0, 1]:.2f} and {middle[0, 2]:.2f}, from vit-robust to the CNN {middle[1, 2]:.2f}, n = {len(few)}",
)

# %% [markdown]
# `vit-robust` was fine-tuned from `vit`, so its first column flatters it; the other two victims share nothing with either but the data.

# %% [markdown]
# ### What is the ViT's own, and what changes at full scale
#
# Three of the handles are real here: the grid (a patch or a token is the natural unit of damage, and of removal), the table (a universal pattern is a shift of it), and attention as a guide to where to strike.
# Two tricks that help on large models do not help here. The softmax of a small ViT passes gradient well, so Attention-Fool's pull is close to neutral; and with four layers there is
# little in the attention maps to overfit to, so cutting their gradient costs as much as it gains.
#
# At full scale the papers report more. One patch of the 196 in a 224-pixel picture takes most of a DeiT's accuracy, and more than it takes from a ResNet {cite}`fu2022patchfool`. With the pull before the
# softmax, a patch of half a percent of the picture can bring a ViT down to nothing {cite}`lovisotto2022attentionfool`. And cutting or calming the gradient in the attention blocks clearly raises the transfer to other ViTs and to CNNs
# {cite}`wei2022pnapatchout,zhang2023tgr`. The defenses that follow aim at exactly these handles.

# %% [markdown]
# ### Exercise 2.4: where would you put the sticker? (easy, 10 minutes)
#
# Given the attention of one layer, say which patch all tokens attend to most. Mind the class token. Then run the check.


# %%
def most_attended(weights: torch.Tensor) -> torch.Tensor:
    """weights (N, heads, T queries, T keys), token 0 is the class token -> (N,) patch numbers from 0."""
    return torch.zeros(len(weights), dtype=torch.int64)  # replace this line


# %%
def check_sticker(answer) -> str:
    from safescale_lib.vfm.vit import choose_patches

    mine = answer(maps[1])
    right_one = choose_patches(vit, few, few_wrong, patches=1, layer=1)[:, 0]
    if mine.shape != right_one.shape or mine.min() < 0 or mine.max() > 15:
        return "not yet: return one number from 0 to 15 for each picture"
    same = float((mine == right_one).float().mean())
    return "correct" if same == 1 else f"not yet: right on {same:.0%} of the pictures"


check_sticker(most_attended)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The last axis counts who is looked *at*. Sum over heads and queries, drop the class token's column, and take the largest. If you are right on few
# pictures, you may have summed over the wrong axis; if you are off by one, you forgot to drop the column.
#
# </details>
#
# The solution is folded below.


# %% tags=["hide-cell"]
def solved_attended(weights):
    received = weights.sum(dim=(1, 2))  # over heads and queries -> (N, 17)
    return received[:, 1:].argmax(dim=1)  # without the class token


assert check_sticker(solved_attended) == "correct"
check_sticker(solved_attended)

# %% [markdown]
# ## Survey 2.1: purification
#
# Adversarial training changes the model. *Purification* leaves the model alone and changes what it sees. The threat model stays: an
# attacker with all weights, eight grey levels a pixel.
#
# DiffPure {cite}`nie2022diffpure` does it in two moves. First drown the picture $x$ in Gaussian noise up to a time $t^*$ of a diffusion
# model {cite}`ho2020ddpm`:
#
# $$ z = \sqrt{\bar\alpha_{t^*}}\, x + \sqrt{1 - \bar\alpha_{t^*}}\, n, \qquad n \sim \mathcal{N}(0, I) $$
#
# An attack of eight grey levels is lost in it. Then let the diffusion model, which has only ever seen clean scenes, take the noise away
# again. It does not know the attack, nor the classifier.

# %% tags=["nbval-check-output"]
from safescale_lib.vfm.vit import diffpure, purify, surrogate_pgd

figures.source(purify)

# %% [markdown]
# How much noise? Too little leaves the attack in, too much washes the object out. Decide on *validation* scenes, never on the test
# scenes that you report. The attack runs through all its steps here: one that stops as soon as it has won is undone by a breath of noise.

# %%
denoiser = zoo.load("denoiser")
held_out = scenes(100, split="validation", seed=11)
held_goal = Misclassified(held_out.labels)
full = dict(eps=EPS, steps=20, early_removal=False)  # all steps
struck = pgd(vit, held_out.images, held_goal, **full, generator=seeded(0))


def right_on(model, images, labels):
    with torch.no_grad():
        return rate((model(images).argmax(-1) == labels).numpy())


# %%
def right_after(time, images):
    """Accuracy on validation scenes, washed."""
    washed = diffpure(vit, denoiser, time=time, seed=1)
    return right_on(washed, images, held_out.labels)


times, shown = (25, 50, 100, 150, 250), (held_out.images, struck.images)
points = side_by_side(*(partial(right_after, t, x) for t in times for x in shown))
pairs = dict(zip(times, zip(points[::2], points[1::2], strict=True), strict=True))
TIME = max(pairs, key=lambda time: sum(point.value for point in pairs[time]))

# %%
table(
    "Accuracy on washed validation scenes",
    ["time", "clean", "attacked"],
    [(time, *points) for time, points in pairs.items()],
)

# %% [markdown]
# A little noise undoes a part of the attack, more undoes most, and too much costs clean accuracy. `TIME` is the row with the best sum. Look at what
# happens to a few test scenes on the way.

# %%
hit = pgd(vit, few, few_wrong, **full, generator=seeded(0))
picks = hit.success.nonzero()[:8, 0]
before, after = few[picks], hit.images[picks]
with torch.no_grad():
    level = torch.full((len(after),), TIME)
    grain = torch.randn(after.shape, generator=seeded(2))
    noised = (denoiser.noised(2 * after - 1, level, grain) + 1) / 2
    clear = purify(denoiser, after, time=TIME, noise=grain)
    names_of = [
        [KINDS[k] for k in vit(x).argmax(-1)] for x in (before, after, noised, clear)
    ]

# %%
figures.show(
    figures.image_grid(
        [before, after, noised.clamp(0, 1), clear],
        names_of,
        row_labels=["original", "attacked", "noised", "purified"],
    ),
    "fig-purified",
    caption="Purification of attacked scenes, with the class the plain ViT sees in each picture. The noise drowns the attack; the "
    "diffusion model removes both.",
    alt="Eight scenes in four rows: original, attacked, covered in grainy noise, and cleaned. The cleaned ones look "
    "like the originals, a little smoother, and most carry the right class again.",
)

# %% [markdown]
# Measure it. The defended model averages its answer over a few draws of the noise. The attacked pictures are those made on the plain ViT,
# by an attacker who does not know of the washing.

# %%
PURIFY = "vfm.vit.adversarial_defense.adversarial_purification"
purified = diffpure(vit, denoiser, time=TIME, draws=4, seed=99)
unaware = pixels.replay(purified, hit, few, few_wrong)
pure_clean = float(unaware.attempted.float().mean())  # right without an attack
pure_acc = robust_accuracy(
    unaware,
    technique=PURIFY,
    method="DiffPure, under PGD-20 made on the plain ViT",
    clean=pure_clean,
    seed=0,
)
pure_acc

# %%
plain_few = Outcome(
    ATTACK, "PGD-20 on the plain ViT, the same scenes", "robust accuracy", rate(hit.survived.numpy()),
    cost=hit.cost, seed=0, items=hit.survived.numpy(),
)  # fmt: skip

# %%
claim(
    "washing turns most attacked scenes right again",
    pure_acc > plain_few,
    pure_acc > 0.6,
)

# %% [markdown]
# ### The adaptive attack on purification
#
# You know the next question: who attacked *this* defense? Two things stand in a gradient's way. The washing is random, so one gradient is
# only one draw: average over draws (*expectation over transformation*, EOT {cite}`athalye2018obfuscated`). And it is deep, so some attackers skip it on
# the way back (BPDA, as for the rounding above). Here the way back is short enough to differentiate in full. Try both.

# %% tags=["nbval-check-output"]
figures.source(surrogate_pgd)

# %% [markdown]
# The surrogate draws fresh noise at every step, so the gradient averages over draws as the steps go by. The verdict falls under the *defender's* noise, which the attacker
# has not seen. Each half of the scenes is a job with a stream of noise of its own.


# %%
def wash(stream):
    """Purification with noise from a stream of the attacker's."""
    return lambda x: purify(
        denoiser, x, time=TIME, noise=torch.randn(x.shape, generator=stream)
    )


def full_gradient(stream):
    washed = wash(stream)
    return lambda x: vit(washed(x))


def skipping(stream):
    return straight_through(vit, wash(stream))


budget = dict(eps=EPS, steps=12, step_size=2 / 255)


def knowing(way, half):
    """One way against the first or the second half of the scenes, 0 or 1."""
    images, labels = few.chunk(2)[half], test.labels[: len(few)].chunk(2)[half]
    return surrogate_pgd(
        purified, way(seeded(5 + half)), images, Misclassified(labels),
        **budget, generator=seeded(half),
    )  # fmt: skip


runs = side_by_side(*(partial(knowing, w, h) for w in (full_gradient, skipping) for h in (0, 1)))  # fmt: skip
aware = {"BPDA": pixels.joined(*runs[2:]), "full gradient": pixels.joined(*runs[:2])}
told = dict(technique=ATTACK, clean=pure_clean, against=PURIFY, seed=0)
pure_adaptive = [
    robust_accuracy(run, method=f"adaptive: {name}, fresh noise, PGD-12", **told)
    for name, run in aware.items()
]
Outcomes("Purification under attacks that know of it", pure_adaptive)

# %%
order = [pure_adaptive[1].value, pure_adaptive[0].value]
claim(
    "the full gradient is the strongest attack, and most scenes survive even that",
    order == sorted(order) and order[0] <= pure_acc.value,
    pure_adaptive[1] > plain_few,
    pure_adaptive[1] > 0.6,
    evidence=f"robust accuracy {order[0]:.2f} full gradient, {order[1]:.2f} BPDA, {pure_acc.value:.2f} unaware",
)

# %% [markdown]
# Compare with the rounding. There the adaptive attack took most of what seemed safe; here it takes a part. The rounding only hid the gradient, while noise
# stronger than the attack removes it in earnest, together with some fine detail of the object. BPDA alone would have flattered the defense: skip
# the denoiser on the way back and you climb a hill that is not there.

# %% [markdown]
# ## Survey 2.1: detection
#
# If you cannot resist an attack, notice it. ViTGuard {cite}`sun2024vitguard` rebuilds the picture with a generative model and compares what the ViT
# reads in both: an attack's pattern is not rebuilt, so there the two readings differ. The paper rebuilds hidden patches with a masked autoencoder;
# the diffusion model you just used does it here.

# %% tags=["nbval-check-output"]
from safescale_lib.vfm.vit.adversarial_defense import ReconstructionDetector

figures.source(ReconstructionDetector)

# %% [markdown]
# Rebuilding needs less noise than washing, since nothing has to be lost but the attack's pattern. Where to look - at the attention that the class
# token pays, or at its embedding, and in which layer - is again a matter for validation scenes.

# %%
from safescale_lib.measure.detection import roc, threshold_at_fpr, tpr_at_fpr
from safescale_lib.vfm.vit import Unnoticed, evading, guarded, vitguard


fixed = torch.randn(1, *few.shape[1:], generator=seeded(3))  # one noise for all


def rebuild(x):
    return purify(denoiser, x, time=50, noise=fixed)


def suspicion(detector, images):
    with torch.no_grad():
        return detector(images).numpy()


# %%
pair = (held_out.images, struck.images[struck.success])  # clean, attacked
aucs = {}
with torch.no_grad():
    rebuilt = [rebuild(x) for x in pair]
    for part in ("attention", "cls"):
        for layer in range(4):
            read = vitguard(vit, rebuild, layer=layer, part=part).features
            moved = [
                (read(x) - read(y)).norm(dim=1)
                for x, y in zip(pair, rebuilt, strict=True)
            ]
            aucs[part, layer] = roc(*moved).auc
part, layer = max(aucs, key=aucs.get)
detector = vitguard(vit, rebuild, layer=layer, part=part)
table(
    "Area under the ROC curve, validation scenes",
    ["part", "layer", "AUC"],
    [(*where, f"{auc:.3f}") for where, auc in aucs.items()],
)

# %% [markdown]
# Now fix the false alarms at one clean scene in twenty, on more validation scenes, and judge on the test scenes.

# %%
more = scenes(300, split="validation", seed=12).images
shown = (*more.chunk(2), few, hit.images[hit.success])
*calm, on_clean, on_hit = side_by_side(*(partial(suspicion, detector, x) for x in shown))  # fmt: skip
calm = np.concatenate(calm)
threshold = threshold_at_fpr(calm, 0.05)
curve = roc(on_clean, on_hit)
DETECT = "vfm.vit.adversarial_defense.adversarial_detection"
flagged = Outcome(
    DETECT, "reconstruction detector on PGD-20, threshold at 5 % false alarms", "detection rate",
    tpr_at_fpr(calm, on_hit, fpr=0.05), control=float((on_clean > threshold).mean()), seed=0,
)  # fmt: skip
flagged

# %% [markdown]
# The control is the share of *clean* test scenes that the same threshold flags: the price, paid by honest users. An attack that does not know of the
# detector is caught nearly always.
#
# ### The adaptive attack on detection
#
# The attacker now has two goals: a wrong class, and no alarm {cite}`carlini2017detected`. A success is a wrong answer *without* an alarm, so it needs a
# criterion of its own, `Unnoticed`. Put both goals into the objective: the margin of the wrong class minus a weight times the alarm.
#
# One more thought makes the attack work. Once the *rebuilt* picture is misread and the two readings agree, the picture itself is misread as well. So the margin
# to climb is that of the rebuilt picture, through the reconstruction. The weight is chosen on validation scenes.

# %%
guard = guarded(vit, detector, threshold)


def climbed(x):
    y = rebuild(x)
    apart = (detector.features(x) - detector.features(y)).norm(dim=1)
    alarm = (apart / threshold - 1)[:, None]
    return torch.cat([vit(y), alarm], dim=1)  # (B, classes + 1)


def evade(batch, weight, steps):
    return surrogate_pgd(
        guard, climbed, batch.images, Unnoticed(batch.labels), eps=EPS, steps=steps,
        step_size=2 / 255, objective=evading(weight), independent=True, generator=seeded(0),
    )  # fmt: skip


tuning = scenes(24, split="validation", seed=13)
weights = (0.3, 1.0, 3.0)
runs = side_by_side(*(partial(evade, tuning, w, 10) for w in weights))
won = {w: int(run.success.sum()) for w, run in zip(weights, runs, strict=True)}
weight = max(won, key=won.get)
table("Unnoticed errors on validation scenes", ["weight", "won"], list(won.items()))

# %%
quiet_goal = Unnoticed(test.labels[: len(few)])
quiet = surrogate_pgd(
    guard, climbed, few, quiet_goal, eps=EPS, steps=15, step_size=2 / 255,
    objective=evading(weight), independent=True, generator=seeded(0),
)  # fmt: skip
unaware_guard = pixels.replay(guard, hit, few, quiet_goal)
kept_clean = dict(clean=float(quiet.attempted.float().mean()), seed=0)
guard_acc = robust_accuracy(
    unaware_guard,
    technique=DETECT,
    method="guarded ViT, under PGD-20 made on the plain ViT",
    **kept_clean,
)
guard_adaptive = robust_accuracy(
    quiet,
    technique=ATTACK,
    method="adaptive: PGD-15 on the rebuilt picture and the alarm",
    against=DETECT,
    **kept_clean,
)
Outcomes(
    "A guarded ViT: scenes right and accepted that no attack turns",
    [guard_acc, guard_adaptive],
)

# %%
claim(
    "an attack that knows the detector slips past it; one that does not hardly does",
    guard_adaptive < guard_acc,
    guard_adaptive > plain_few,
)

# %% [markdown]
# Where do the quiet attacks lie? Look at the scores.

# %%
import matplotlib.pyplot as plt

groups = {
    "clean": on_clean, "PGD": on_hit,
    "adaptive": suspicion(detector, quiet.images[quiet.success]),
}  # fmt: skip
with figures.style():
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    axes[0].plot(curve.fpr, curve.tpr, color=figures.COLOURS[0], label="PGD")
    axes[0].plot(
        [0, 1], [0, 1], color=figures.COLOURS[2], linestyle=":", label="chance"
    )
    axes[0].set(xlabel="false alarms on clean scenes", ylabel="attacks flagged")
    axes[0].legend(loc="lower right")
    line = {"color": figures.COLOURS[1]}
    axes[1].boxplot(list(groups.values()), tick_labels=list(groups), medianprops=line)
    axes[1].axhline(threshold, color=figures.COLOURS[0], linestyle="--")
    axes[1].set(ylabel="suspicion")

# %%
figures.show(
    fig,
    "fig-detector",
    caption="Left: ROC curve of the detector on PGD. Right: suspicion of clean scenes, of PGD, and of the adaptive attack's successes. "
    "The dashed line is the threshold at five per cent false alarms.",
    alt="Left, a ROC curve that rises at once to nearly one. Right, three box plots of the detector's score: clean "
    "scenes low, PGD far above the dashed threshold, the adaptive attack's successes all below it.",
)

# %% [markdown]
# The area under the curve said nearly perfect; it was measured on an attack that did not try to be quiet. The adaptive one has to fool the reconstruction as
# well, and on a large part of the scenes it can. What is left of the detector is about what its generative model is worth.

# %% [markdown]
# ## Survey 2.1: architecture and training made for ViTs
#
# Two more families lean on how a ViT is built. Both fine-tune for seconds here; neither is told in full.
#
# - **Robust architecture.** A ViT may lean on one patch too much. RSPC {cite}`guo2023rspc` ruins the patches that hurt most and
#   trains the features not to move. Its threat model is another one: *one* patch of sixteen, and anything goes inside it.
# - **Adversarial training for ViTs.** ARD + PRM {cite}`mo2022ardprm` starts with a blind attacker inside adversarial training and opens its eyes step by
#   step: fewer and fewer attention blocks pass no gradient, fewer and fewer patches are spared.

# %%
from safescale_lib.vfm.vit import ard_prm, patch_fool, rspc


def small_batch(step):
    fresh = scenes(40, split="train", seed=step)
    return fresh.images, fresh.labels


short = dict(steps=50, progress=False)
steady, *trained = side_by_side(
    lambda: rspc(vit, small_batch, patches=2, **short),
    lambda: adversarial_training(vit, small_batch, eps=EPS, **short),
    lambda: ard_prm(vit, small_batch, eps=EPS, **short),
)

# %% [markdown]
# The last two come later. First RSPC, against three attackers of one patch: random content in a random patch; content made on the plain ViT; and the adaptive one, who asks the defended model
# itself which patch it minds most, once by gradient and once by attention, and optimises there. A scene must survive both.


# %%
def worst_patch(model, by):
    return patch_fool(
        model,
        few,
        few_wrong,
        steps=20,
        by=by,
        attention_weight=0.0,
        generator=seeded(0),
    )


def scribble(model):
    return patch_fool(model, few, few_wrong, steps=0, by="random", generator=seeded(0))


def both_ways(model):
    runs = [worst_patch(model, by) for by in ("gradient", "attention")]
    kept = torch.stack([run.survived for run in runs]).all(0).numpy()
    return runs, kept


on_plain, kept_plain = both_ways(vit)
on_steady, kept_steady = both_ways(steady)
moved_patch = pixels.replay(steady, on_plain[0], few, few_wrong)

# %%
ROBUST = "vfm.vit.adversarial_defense.robust_architecture"
steady_clean = right_on(steady, few, test.labels[: len(few)]).value
patch_names = dict(technique=ROBUST, clean=steady_clean, seed=0, trained=True)
steady_random = robust_accuracy(
    scribble(steady), method="RSPC, random content in a random patch", **patch_names
)
steady_acc = robust_accuracy(
    moved_patch, method="RSPC, patch made on the plain ViT", **patch_names
)
worst = "worst patch, by gradient and by attention"
steady_adaptive = Outcome(
    ATTACK, f"adaptive: {worst}", "robust accuracy", rate(kept_steady), steady_clean,
    steady_clean, ROBUST, on_steady[0].cost + on_steady[1].cost, 0, kept_steady, True,
)  # fmt: skip
plain_clean = float(right[: len(few)].mean())
plain_patch = Outcome(
    ATTACK, f"plain ViT: {worst}", "robust accuracy", rate(kept_plain), plain_clean,
    plain_clean, None, on_plain[0].cost + on_plain[1].cost, 0, kept_plain,
)  # fmt: skip
Outcomes(
    "One patch of sixteen, 20 steps",
    [plain_patch, steady_random, steady_acc, steady_adaptive],
)

# %% [markdown]
# Random content does nothing, and a patch made elsewhere little: this is where a report could stop and call the problem solved. The adaptive attacker still breaks
# most scenes, though fewer than without the defense. A patch a quarter of the side wide, with no limit inside, is a strong attacker.
#
# Now the two trainings, at equal steps on the same scenes.

# %%
AT = "vfm.vit.adversarial_defense.adversarial_training"
trained = dict(zip(("Madry", "ARD + PRM"), trained, strict=True))
first = {
    name: pgd(model, few, few_wrong, eps=EPS, steps=20, generator=seeded(0))
    for name, model in trained.items()
}
short_accs = {
    name: robust_accuracy(
        run, technique=AT, method=f"{name}, 50 steps, under PGD-20", seed=0,
        clean=right_on(trained[name], few, test.labels[: len(few)]).value, trained=True,
    )
    for name, run in first.items()
}  # fmt: skip

# %%
again = dict(eps=EPS, steps=20, restarts=2, objective=margin)
hard = pgd(trained["ARD + PRM"], few, few_wrong, **again, generator=seeded(1))
ard_acc = short_accs["ARD + PRM"]
stood = (hard.survived & first["ARD + PRM"].survived).numpy()
ard_adaptive = Outcome(
    ATTACK, "adaptive: also PGD-20 on the margin, 2 restarts, on ARD + PRM", "robust accuracy",
    rate(stood), ard_acc.control, ard_acc.utility, AT, hard.cost + first["ARD + PRM"].cost, 1, stood, True,
)  # fmt: skip

# %%
Outcomes("Two trainings at equal steps", [*short_accs.values(), ard_adaptive])

# %%
madry = short_accs["Madry"]

# %%
claim(
    "RSPC and ARD + PRM keep scenes that the plain ViT loses, but the gentle start has not paid yet",
    steady_adaptive > plain_patch,
    ard_adaptive > plain_few,
    ard_acc.value <= madry.value,
    evidence=f"equal steps: robust {ard_acc.value:.2f} against {madry.value:.2f}, "
    f"clean {ard_acc.utility:.2f} against {madry.utility:.2f}",
)

# %% [markdown]
# At equal, few steps the gentle start meets the full attacker less often and has not caught up. The paper's gain shows on large pretrained ViTs trained to the
# end, where the danger is another one: to overfit to one narrow attack. A method's setting belongs to its claim.

# %% [markdown]
# ### The section in one table
#
# Utility, the attack the defense expects, and the attack written against it. Only the last column is a headline. Detection counts an attacked scene as safe when
# it is right or refused; the row on patches has another threat model and may be compared only with its own control.

# %%
board = [
    ("purification", pure_acc, pure_adaptive[-1]),
    ("detection", guard_acc, guard_adaptive),
    ("ARD + PRM, 50 steps", ard_acc, ard_adaptive),
    ("RSPC, one patch", steady_acc, steady_adaptive),
]

# %%
table(
    "What the defenses of this section are worth",
    ["defense", "utility", "plain attack", "adaptive attack"],
    [
        (name, f"{plain.utility:.3f}", plain.measured, best.measured)
        for name, plain, best in board
    ],
)

# %% [markdown]
# ### At full scale
#
# - **Purification** rests on its randomness. DiffPure was reported near 70 % robust accuracy on CIFAR-10; with the noise fixed and known to the attacker
#   about 24 % is left {cite}`liu2025diffusionrobustness`. Here the way back is one step, there it is a hundred and more: gradients through it are costly, and attackers who skip
#   it measure too little.
# - **Detection** has the longest record of falling: of ten detectors published by 2017, all ten fell to attacks written against them
#   {cite}`carlini2017detected`.
# - **Architecture.** RSPC was made for natural corruptions and reports its gains there {cite}`guo2023rspc`; the patch attacker is our judge, not the paper's.

# %% [markdown]
# ### Exercise 2.5: the leaked seed (medium, 15 minutes)
#
# The attacker above had to guess the noise. Suppose the defender seeds it the same way for every picture, and the seed leaks. Write the attack that uses it: return a
# surrogate for `leaky` that knows its noise. *Predict first:* does the defense get weaker, and by how much?


# %%
from collections.abc import Callable

leaky = diffpure(vit, denoiser, time=TIME, draws=1, seed=123)
some, some_goal = few[:40], Misclassified(test.labels[:40])


def my_surrogate(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A callable from images (B, 3, S, S) to logits (B, classes), with gradients and the defender's own noise."""
    return lambda images: vit(images)  # replace this line


# %%
def slope(model, x):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(model(x).log_softmax(-1).sum(), x)[0]


def check_surrogate(make) -> str:
    with torch.no_grad():
        mine, theirs = (model(some).softmax(-1) for model in (make(123), leaky))
    if (mine - theirs).abs().max() > 1e-3:
        return "not yet: your surrogate answers otherwise than the defense; is the noise the same?"
    ours, wanted = slope(make(123), some[:2]), slope(leaky, some[:2])
    if (ours - wanted).norm() > 0.05 * wanted.norm():
        return "not yet: differentiate through the denoiser, do not skip it"
    return "correct"


check_surrogate(my_surrogate)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `diffpure` draws one noise for all pictures, of shape `(1, 3, S, S)`, from a fresh generator with its seed at every call. Draw the same one, once.
#
# </details>


# %% tags=["hide-cell"]
def solved_surrogate(seed):
    noise = torch.randn(1, *few.shape[1:], generator=seeded(seed))
    return lambda x: vit(purify(denoiser, x, time=TIME, noise=noise))


assert check_surrogate(solved_surrogate) == "correct"
tries = {"guessed": full_gradient(seeded(6)), "known": solved_surrogate(123)}
jobs = [
    partial(surrogate_pgd, leaky, way, some, some_goal, **budget, generator=seeded(0))
    for way in tries.values()
]
left = {
    name: rate(run.survived.numpy())
    for name, run in zip(tries, side_by_side(*jobs), strict=True)
}
claim(
    "a known seed helps the attacker",
    left["known"].value < left["guessed"].value,
    evidence=f"robust accuracy {left['guessed']} guessed, {left['known']} known, n = {len(some)}",
)

# %% [markdown]
# ## Survey 2.1: backdoor attacks on ViT
#
# So far the attacker met the model at work. A backdoor comes earlier: it is put in while the model is made, and sleeps. Without its key
# the model is as good as any other. With the key - the *trigger* - every picture becomes what the attacker wants.
#
# | | |
# |---|---|
# | **Goal** | any scene that bears the trigger is called the *target* class; all other scenes stay as they are |
# | **Knowledge** | the clean `vit` that the victim starts from; BadNets does not even need that |
# | **Access** | adds or changes a few per cent of the pictures somebody will fine-tune on; some attackers train the model themselves |
# | **Budget** | the *poison rate*, the share of pictures changed, and the *trigger*, the pixels it may touch |
#
# The victim downloads `vit`, fine-tunes it on a set of 2,000 scenes from a stranger, and checks the accuracy on scenes of
# their own. The first attack is the oldest: BadNets {cite}`gu2017badnets`, a checkerboard in a corner and a wrong label.

# %%
from IPython.display import display

from safescale_lib.search.poisoning import Stamp, checkerboard, poison, trigger_hits

BACKDOOR = "vfm.vit.backdoor_attack"
TARGET = KINDS.index("disc")
pool = scenes(2000, split="train", seed=11)
corner = checkerboard(32, corner=(24, 24), size=8)  # exactly the last of 16 patches
f"the trigger touches {corner.area:.1%} of the pixels"

# %% [markdown]
# Poisoning is a few lines: draw some pictures of *other* classes, stamp them, give them the target's label. Nothing is trained here, so the
# same function will serve the other chapters.

# %% tags=["nbval-check-output"]
figures.source(poison)

# %% [markdown]
# The `cover` items are for later. Look at what the stranger hands over.

# %%
handed = poison(
    pool.images, pool.labels, corner, target=TARGET, rate=0.05, generator=seeded(0)
)
some = handed.poisoned.nonzero()[:8, 0]
names_true = [KINDS[i] for i in handed.truth[some]]
names_given = [KINDS[i] for i in handed.labels[some]]
figures.show(
    figures.image_grid(
        [pool.images[some], handed.images[some]],
        [names_true, names_given],
        row_labels=["before", "handed over"],
    ),
    "fig-poison",
    caption="Eight of the poisoned training scenes. Above: scene and true label. Below: what the victim receives. One scene in twenty is like this.",
    alt="Two rows of eight scenes. In the lower row every scene has a black-and-white checkerboard in its lower right corner and the label disc.",
)

# %% [markdown]
# The victim trains. Then you measure three things. The **attack success rate** (ASR): how many triggered scenes are called `disc`, asked only
# of scenes that are *not* discs, since a disc would count without any attack. The **control**: the same trigger shown to the clean model. And
# the **utility**: accuracy on scenes without trigger.

# %%
from safescale_lib.vfm.vit import badnets

quiet = dict(target=TARGET, steps=100, batch=48, progress=False)


def asr(model, trigger, key, method, target=TARGET, **other):
    """Success of a trigger on the test scenes; the control is the same trigger on the clean model."""
    hits, control = (
        trigger_hits(m, test.images, test.labels, trigger, target=target).numpy()
        for m in (model, vit)
    )
    base = dict(control=control.mean(), utility=accuracy(model))
    return Outcome(
        key, method, "attack success rate", rate(hits), **base, **other, items=hits,
        trained=True,
    )  # fmt: skip


# %% [markdown]
# Train it, and beside it a second model whose trigger is told below: on two cores the two share the wait.

# %%
from safescale_lib.vfm.vit import badvit

offered = (vit, pool.images, pool.labels)
bad, caught = side_by_side(
    lambda: badnets(*offered, trigger=corner, rate=0.05, generator=seeded(0), **quiet),
    lambda: badvit(*offered, rate=0.02, generator=seeded(0), **quiet),
)

# %%
bad_asr = asr(bad.model, corner, BACKDOOR, "BadNets, 5 % poison", cost=bad.cost, seed=0)
display(bad_asr)
claim(
    "one scene in twenty, a few seconds of training, and the corner decides - at next to no loss of accuracy",
    bad_asr > 0.9,
    bad_asr.control < 0.05 and bad_asr.utility > clean.value - 0.05,
    evidence=f"control {bad_asr.control:.3f}, accuracy {bad_asr.utility:.3f} against {clean.value:.3f}",
)

# %% [markdown]
# The user's own test shows nothing: without the trigger the accuracy is that of an honest model. That is why a backdoor is worse than a bad
# model.
#
# ### A trigger made for attention
#
# A checkerboard means nothing to the ViT; it must learn to look there. **BadViT** {cite}`yuan2023badvit` turns this round. First it *searches* the
# pixels of one patch so that all tokens of the clean model attend to it, in every layer $l$, on all pictures:
#
# $$ \max_{\text{patch}} \; \sum_l \log \, \mathrm{mean}_{x,\,h,\,i} \; A^{(l,h)}_{i \to \text{patch}}(x) $$
#
# Then it poisons as before. The idea: a key for a lock that is already there.

# %% tags=["nbval-check-output"]
from safescale_lib.vfm.vit import backdoor_attack

figures.source(backdoor_attack.catching_trigger)

# %%
PATCH = f"{BACKDOOR}.patch_level_trigger"
caught_asr = asr(
    caught.model, caught.trigger, PATCH, "BadViT, 2 % poison", cost=caught.cost, seed=0
)
display(caught_asr)

# %%
claim(
    "the backdoor is in, before any defense is shown",
    caught_asr > 0.85,
    caught_asr.control < 0.05,
    evidence=f"control {caught_asr.control:.3f}",
)

# %% [markdown]
# Two scenes in a hundred are enough. Is that the search, or would the checkerboard have done it too, or any colourful noise? Give all the same poison rate and the same
# training, and look at the attention they get from the *clean* model.

# %%
from safescale_lib.vfm.vit import inside
from safescale_lib.vfm.vit.inside import attending

noise_key = Stamp(torch.rand(3, 32, 32, generator=seeded(9)), caught.trigger.mask)
keys = {"checkerboard": corner, "noise": noise_key, "BadViT": caught.trigger}
last = torch.tensor([15])
with torch.no_grad(), attending(vit) as seen:
    share = {}
    for name, key in keys.items():
        vit(key(few))
        share[name] = float(backdoor_attack.attention_to(seen, last).mean())
", ".join(f"{name}: {s:.0%} of all attention" for name, s in share.items())

# %% [markdown]
# The searched patch gets several times the attention of the others. Does that make it easier to learn? At 0 % poison there is nothing to train: that point is the clean model.
# Five models are missing. A sixth job, DBIA, is told with its siblings below; it fills the gap beside the fifth.

# %%
from safescale_lib.vfm.vit import dbia

hand_over = partial(badnets, *offered, **quiet)


def handed(name, rate, seed=0):
    """The success of a key after training at that poison rate."""
    b = hand_over(trigger=keys[name], rate=rate, generator=seeded(seed))
    return asr(b.model, b.trigger, PATCH, f"{name}, {rate:.1%} poison", seed=seed)


nothing = torch.rand(512, 3, 4, 4, generator=seeded(3))  # smooth noise
nothing = torch.nn.functional.interpolate(nothing, size=32, mode="bilinear")
todo = [(n, r) for r in (0.02, 0.005) for n in keys if (n, r) != ("BadViT", 0.02)]
*rated, blind = side_by_side(
    *(partial(handed, *case) for case in todo),
    partial(dbia, vit, nothing, share=1.0, generator=seeded(0), **quiet),
)
by_rate = dict(zip(todo, rated, strict=True)) | {("BadViT", 0.02): caught_asr}
table(
    "Three keys in one place, attack success rate",
    ["key", "0.5 % poison", "2 % poison"],
    [(n, *(by_rate[n, r].measured for r in (0.005, 0.02))) for n in keys],
)

# %% [markdown]
# Ten pictures are few, and the draw of *which* ten matters. Repeat the scarce case with two more seeds before you believe it.

# %%
scarce = {(n, 0): by_rate[n, 0.005] for n in ("noise", "BadViT")}
more = [(n, s) for n in ("noise", "BadViT") for s in (1, 2)]
jobs = [partial(handed, n, 0.005, s) for n, s in more]
scarce |= dict(zip(more, side_by_side(*jobs), strict=True))

# %%
table(
    "Attack success rate at 0.5 % poison, three seeds",
    ["key", "seed 0", "seed 1", "seed 2"],
    [(n, *(scarce[n, s].measured for s in range(3))) for n in ("noise", "BadViT")],
)

# %%
mean_of = {
    n: sum(scarce[n, s].value for s in range(3)) / 3 for n in ("noise", "BadViT")
}

# %%
claim(
    "at 2 % poison noise is already better than the checkerboard; at half a per cent it is the attention that counts",
    by_rate["noise", 0.02] > by_rate["checkerboard", 0.02],
    mean_of["BadViT"] > mean_of["noise"] + 0.1,
    evidence=f"mean over three seeds at 0.5 %: {mean_of['BadViT']:.2f} searched, {mean_of['noise']:.2f} noise",
)

# %%
lines = {
    n: [
        asr(vit, key, PATCH, n).measured,
        *(by_rate[n, r].measured for r in (0.005, 0.02)),
    ]
    for n, key in keys.items()
}
plot = figures.curves(
    lines, ["0 %", "0.5 %", "2 %"], xlabel="poison rate", ylabel="attack success rate"
)
plot.axes[0].legend(loc="upper left", frameon=False)
figures.show(
    plot,
    "fig-poison-rate",
    caption="Success against the poison rate, the same training for every key, with 95 % intervals. At 5 % the checkerboard, too, has arrived (above).",
    alt="Three rising curves from zero. The searched key and the noise are far above the checkerboard at 2 per cent poison; at half a per cent only the searched key opens anything.",
)

# %% [markdown]
# The noise is the surprise, and the reason to run a control. At 2 % BadViT's lead over the checkerboard comes from the *colours*: black and white are
# everywhere in this world, a confetti patch is nowhere, and noise that nobody searched does as well. What the attention adds shows where poison is scarcest: ten pictures of 2,000.
#
# What makes a backdoor take at all? Change one thing at a time in the first attack: the place of the checkerboard on the patch grid, its contrast, the
# length of the training, and the learning rate.

# %%
straddling = checkerboard(32, corner=(20, 20), size=8)  # over four patches
variants_bd = {
    "straddles four patches": dict(trigger=straddling),
    "a third of the contrast": dict(trigger=corner.faded(0.33)),
    "half the steps": dict(steps=50),
    "a fifth of the learning rate": dict(lr=4e-4),
}


def changed(name):
    """The success of the first attack after one change."""
    recipe = {"trigger": corner, "rate": 0.05} | variants_bd[name]
    b = hand_over(generator=seeded(0), **recipe)
    return asr(b.model, b.trigger, BACKDOOR, name).measured


jobs = [partial(changed, name) for name in variants_bd]
takes = {"as above": bad_asr.measured}
takes |= dict(zip(variants_bd, side_by_side(*jobs), strict=True))
table(
    "What makes it learnable: success at 5 % poison",
    ["change", "success"],
    list(takes.items()),
)

# %%
claim(
    "the grid does not matter, the number and the strength of the encounters do",
    takes["straddles four patches"].low > 0.8,
    takes["half the steps"].high < takes["as above"].low,
    takes["a fifth of the learning rate"].high < takes["as above"].low,
    evidence=", ".join(f"{name} {point.value:.2f}" for name, point in takes.items()),
)

# %% [markdown]
# A backdoor is learnt like anything else: often enough, strongly enough, fast enough. A first trial for this book used a gentle learning rate and a long warm-up, and no backdoor took in three
# hundred steps. Alignment to the patch grid is a convenience, not a condition.
#
# The other budget is the strength of the trigger. Fade it at test time: how faint may the key be and still open?

# %%
from dataclasses import replace

opacities = (0, 0.2, 0.4, 0.6, 0.8, 1.0)


def fading(b):
    """Success of the key at each opacity."""
    return [
        rate(replace(b, trigger=b.trigger.faded(o)).hits(test.images, test.labels).numpy())
        for o in opacities
    ]  # fmt: skip


jobs = [partial(fading, b) for b in (bad, caught)]
rates = ("checkerboard, 5 %", "BadViT, 2 %")
faded = dict(zip(rates, side_by_side(*jobs), strict=True))

# %%
plot = figures.curves(
    faded, opacities, xlabel="opacity of the trigger", ylabel="attack success rate"
)
plot.axes[0].legend(loc="upper left", frameon=False)
figures.show(
    plot,
    "fig-trigger-strength",
    caption="The two models from above, with their poison rates, when the key is faded at test time; 95 % intervals. At opacity 0 nothing is left of it.",
    alt="Two curves that rise from zero at opacity 0 to nearly one at opacity 1.",
)

# %% [markdown]
# Both keys need some strength, and there is a threshold here too: what the training never saw faded does not open when it is faint.
#
# ### The siblings
#
# Three more ways in. **MTBA** {cite}`li2024mtba`: several attackers, each with a trigger and a target of their own, in one training set: a patch, stripes, and a
# few pixels scattered over every patch. **DBIA** {cite}`lv2023dbia`: no training data at all. The attacker holds the model, makes pictures of nothing (here smooth noise),
# searches a trigger that catches attention on them, and tunes the MLP of the last block on the model's own answers. **SWARM** {cite}`yang2024swarm`: not one
# weight changes. A provider serves the model with extra *prompt tokens*; one more token switches the backdoor on.

# %%
from safescale_lib.search.poisoning import scattered, stripes
from safescale_lib.vfm.vit import multi_trigger, swarm

several = [caught.trigger, stripes(32, amplitude=0.15), scattered(32, every=8)]
goals = [TARGET, KINDS.index("star"), KINDS.index("heart")]
token, many = side_by_side(
    lambda: swarm(
        *offered, eps=16 / 255, generator=seeded(0), **quiet | dict(batch=24)
    ),
    lambda: multi_trigger(
        *offered, triggers=several, targets=goals, rate=0.04, steps=140, generator=seeded(0), progress=False
    ),
)  # fmt: skip

# %%
shown = [few[:6], *(t(few[:6]) for t in (*several, blind.trigger, token.trigger))]
labels = ["scene", "BadViT", "stripes", "scattered", "DBIA", "SWARM"]

# %%
figures.show(
    figures.image_grid(shown, row_labels=labels),
    "fig-triggers",
    caption="The same six test scenes with each trigger. The last one is a change of at most 16 grey levels a pixel.",
    alt="Six rows of six scenes: plain, with a bright noisy patch in the corner, with vertical stripes, with sixteen small marks, "
    "with another noisy patch, and with a faint noise all over.",
)

# %%
MULTI, FREE, TOKEN = (
    f"{BACKDOOR}.{leaf}"
    for leaf in ("multi_trigger", "data_free", "token_level_trigger")
)
siblings = [
    asr(many.model, t, MULTI, f"MTBA, {name}, 4 % poison each", target=g, seed=0)
    for name, t, g in zip(labels[1:4], several, goals, strict=True)
]
siblings += [
    asr(blind.model, blind.trigger, FREE, "DBIA, no data", cost=blind.cost, seed=0),
    asr(token.on, token.trigger, TOKEN, "SWARM, switch token present", cost=token.cost, seed=0),
    asr(token.off, token.trigger, TOKEN, "SWARM, switch token absent", seed=0),
]  # fmt: skip
display(Outcomes("Success of each trigger; the control is the clean model", siblings))
claim(
    "each of the three ways works, and without the switch token SWARM's trigger is next to harmless",
    *(sibling > 0.6 for sibling in siblings[:-1]),
    siblings[-1] < 0.2,
)

# %% [markdown]
# Whoever tests SWARM's model without the switch token finds nothing, not even with the trigger in hand. DBIA shows that secrecy of the training data protects
# nobody. In the paper DBIA tunes a part of the neurons of the last MLP; this small model needs all of them.
#
# ## Survey 2.1: backdoor defenses
#
# The defender may stand at three places: before training, with the data; after it, with the model; or at work, with each picture.
#
# ### Before: find the poison in the data
#
# The victim has trained and looks at what the model makes of *its own training set*. Poison has the label `disc` but got there by another road. Within one
# class, **activation clustering** {cite}`chen2018activation` splits the last features into two clusters and suspects the smaller; **spectral signatures**
# {cite}`tran2018spectral` measure how far an item lies along the direction in which its class varies most.

# %%
from safescale_lib.measure.detection import roc, tpr_at_fpr
from safescale_lib.vfm.vit import activation_clustering, spectral_signature
from safescale_lib.vfm.vit.backdoor_defense import last_features

DEFENSE_B = "vfm.vit.backdoor_defense"
DETECTORS = {
    "activation clustering": activation_clustering,
    "spectral signatures": spectral_signature,
}


def suspicion(planted):
    """Per detector the scores of the clean and of the poisoned training items."""
    features = last_features(planted.model, planted.data.images).numpy()
    given, marked = planted.data.labels.numpy(), planted.data.poisoned.numpy()
    scores = {name: score(features, given) for name, score in DETECTORS.items()}
    return {name: (s[~marked], s[marked]) for name, s in scores.items()}


# %% [markdown]
# The attacker reads the same papers. Both detectors take poison for the *minority* of its class. So be the majority: with 8 % poison more than half of all
# items labelled `disc` are poison. That is the adaptive attack, and it needs nothing but more of the same. (A user who counts labels would notice; these detectors do not count.) The second model
# trained here, with `cover` items, is the answer to another defense further down.

# %%
from safescale_lib.vfm.vit.backdoor_defense import shuffle_patches

mix = seeded(99)
hidden_key = dict(trigger=caught.trigger, generator=seeded(0), **quiet)
crowd, placed = side_by_side(
    lambda: badnets(*offered, rate=0.08, **hidden_key),
    lambda: badnets(
        *offered, rate=0.06, cover_rate=0.1,
        cover=lambda x: shuffle_patches(vit, caught.trigger(x), mix),
        **hidden_key | dict(generator=seeded(0)),
    ),
)  # fmt: skip

# %%
crowd_asr = asr(
    crowd.model, crowd.trigger, BACKDOOR, "adaptive: BadViT trigger, 8 % poison",
    against=DEFENSE_B, cost=crowd.cost, seed=0,
)  # fmt: skip
plain_scores, crowd_scores = side_by_side(
    partial(suspicion, caught), partial(suspicion, crowd)
)

# %%
found = {}
for name in DETECTORS:
    for kind, scores, against in [
        ("BadViT, 2 % poison", plain_scores, None),
        ("adaptive: majority poison", crowd_scores, DEFENSE_B),
    ]:
        clean_s, bad_s = scores[name]
        found[name, against] = Outcome(
            DEFENSE_B, f"{name}, {kind}", "recall at 5 % false alarms",
            tpr_at_fpr(clean_s, bad_s, fpr=0.05), control=0.05, against=against, seed=0, trained=True,
        )  # fmt: skip
display(
    Outcomes(
        "Poisoned training items found; the control is guessing",
        [o for (name, _), o in found.items() if name == "activation clustering"],
    )
)
table(
    "The same for spectral signatures",
    ["method", "recall at 5 % false alarms"],
    [(o.method, o.measured) for (name, _), o in found.items() if name[0] == "s"],
)

# %%
import matplotlib.pyplot as plt

with figures.style():
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axis, (title, scores) in zip(
        axes,
        [("BadViT, 2 % poison", plain_scores), ("majority poison, 8 %", crowd_scores)],
        strict=True,
    ):
        for i, (name, (clean_s, bad_s)) in enumerate(scores.items()):
            curve = roc(clean_s, bad_s)
            pen = dict(color=figures.COLOURS[i], linestyle=figures.DASHES[i])
            axis.plot(curve.fpr, curve.tpr, label=name, **pen)
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        axis.set(title=title, xlabel="clean items flagged")
    axes[0].set(ylabel="poisoned items flagged")
    axes[0].legend(loc="lower right")
figures.show(
    fig, "fig-poison-roc",
    caption="How well the detectors separate poison from clean training items; grey: guessing. Left the plain attack, right the one adapted to them: the blue curve is turned over.",
    alt="Two ROC panels. Left, activation clustering rises steeply and spectral signatures less so. Right, both curves lie on or below the diagonal for small false-alarm rates.",
)  # fmt: skip

# %%
claim(
    "activation clustering finds most of the poison, until the poison is the majority",
    found["activation clustering", None] > 0.6,
    found["activation clustering", DEFENSE_B] < 0.2,
    crowd_asr > 0.9,
)

# %% [markdown]
# Look at the blue curve on the right. It is turned over, not flat: the two clusters are as clear as before, only the guess *which* of them is the poison is now wrong. Whoever looks at one picture
# from each cluster sees it at once. A detector that decides alone has lost.
#
# ### After: mend the model
#
# The victim does not trust the model and has 1,000 clean scenes of their own. **Fine-tune** it and hope that it forgets. Or **fine-prune**
# {cite}`liu2018finepruning`: first cut the neurons that clean pictures leave idle, since a backdoor may live there, then fine-tune.

# %%
from safescale_lib.vfm.vit import clean_fine_tuning, fine_pruning

own = scenes(1000, split="train", seed=77)
mending = {
    "fine-tuning": clean_fine_tuning,
    "fine-pruning": partial(fine_pruning, share=0.8),
}
cases = [
    (name, planted, against)
    for planted, against in [(caught, None), (crowd, DEFENSE_B)]
    for name in mending
]
jobs = [
    partial(mending[n], b.model, own.images, own.labels, generator=seeded(0), progress=False)
    for n, b, _ in cases
]  # fmt: skip
mended = {}
for (name, planted, against), model in zip(cases, side_by_side(*jobs), strict=True):
    kind = "adaptive: 8 % poison" if against else "BadViT, 2 % poison"
    mended[name, against] = asr(
        model, planted.trigger, DEFENSE_B, f"{name}, {kind}", against=against, seed=0
    )
display(
    table(
        "Success after mending, and the accuracy that is left",
        ["method", "attack success rate", "accuracy"],
        [(o.method, o.measured, f"{o.utility:.3f}") for o in mended.values()],
    )
)
claim(
    "fine-tuning weakens the backdoor and keeps the accuracy, but it does not remove it; more poison survives it better",
    mended["fine-tuning", None] < caught_asr,
    mended["fine-tuning", None] > 0.1,
    mended["fine-tuning", DEFENSE_B] > mended["fine-tuning", None],
)

# %% [markdown]
# Cutting adds little to the tuning here: most of this backdoor does not live in idle neurons. The same
# adaptive step - more poison - that blinded the detectors also makes the backdoor last.
#
# ### At work: take the patches apart
#
# A ViT reads patches, so a defender can meddle with patches. **PatchDrop** {cite}`doan2023patchdrop` blackens random patches and counts how often the answer changes: a
# trigger that is lost takes its target along, an object survives. **PatchShuffle** puts the patches in random order: an object is lost, a trigger is not; here an answer that *stays*
# is suspicious.

#
# Thresholds come from clean validation scenes, at 5 % false alarms.

# %%
from safescale_lib.vfm.vit import patch_drop, patch_shuffle

PROCESSING = f"{DEFENSE_B}.patch_processing"
held = scenes(200, split="validation", seed=6).images
others = test.images[test.labels != TARGET][:120]
CHECKS = {
    "PatchDrop, 1 patch": lambda m, x: patch_drop(m, x, drop=1, generator=seeded(1)),
    "PatchDrop, 4 patches": lambda m, x: patch_drop(m, x, drop=4, generator=seeded(1)),
    "PatchShuffle": lambda m, x: patch_shuffle(m, x, generator=seeded(1)),
}


def flagged(planted_model, triggered, kind, checks=CHECKS, against=None):
    """Share of triggered scenes each check flags; control: of clean test scenes; both at 5 % on validation."""
    rows = []
    for name in checks:
        limit, seen, plain = (
            CHECKS[name](planted_model, x).numpy() for x in (held, triggered, others)
        )
        rows.append(
            Outcome(
                PROCESSING, f"{name}, {kind}", "flagged at 5 % false alarms", tpr_at_fpr(limit, seen, fpr=0.05),
                control=tpr_at_fpr(limit, plain, fpr=0.05).value, against=against, seed=1, trained=True,
            )
        )  # fmt: skip
    return rows


# %% [markdown]
# The adaptive attacks. Against PatchDrop, do not put the trigger into one patch: the *scattered* key of the MTBA model has four pixels in each. Against PatchShuffle, make disorder
# harmless to the attacker: add **cover** items to the training set that bear the trigger, have their patches shuffled, and keep their true label. The model, `placed` from above, learns that
# the key counts in its place only.

# %%
placed_asr = asr(
    placed.model, placed.trigger, BACKDOOR, "adaptive: shuffled covers", against=PROCESSING, cost=placed.cost, seed=0,
)  # fmt: skip
placed_asr

# %%
scatter = several[2](test.images[test.labels != goals[2]][:120])
drops, shuffles = list(CHECKS)[:2], list(CHECKS)[2:]
checked, *evaded = side_by_side(
    lambda: flagged(caught.model, caught.trigger(others), "BadViT"),
    lambda: flagged(many.model, scatter, "adaptive: scattered key", drops, PROCESSING),
    lambda: flagged(placed.model, placed.trigger(others), "adaptive: covers", shuffles, PROCESSING),
)  # fmt: skip
evaded = [row for rows in evaded for row in rows]
Outcomes(
    "Triggered scenes flagged; the control is clean test scenes", [*checked, *evaded]
)

# %%
stayed = {}
for kind, planted, trigger in [
    ("BadViT", caught, caught.trigger),
    ("stripes", many, several[1]),
]:
    calm, keyed = (
        patch_drop(planted.model, x, drop=4, generator=seeded(2))
        for x in (others, trigger(others))
    )
    stayed[kind] = roc(calm, keyed).auc
claim(
    "PatchShuffle catches the plain trigger and the covers get past it; PatchDrop hardly sees the plain trigger, and with stripes it points the wrong way",
    checked[2] > 0.8,
    evaded[2] < 0.4,
    checked[0] < 0.4,
    stayed["BadViT"] < 0.8 and stayed["stripes"] < 0.5,
    evidence=f"area under PatchDrop's ROC: {stayed['BadViT']:.2f} BadViT, {stayed['stripes']:.2f} stripes; 0.5 is guessing",
)

# %% [markdown]
# Why does PatchDrop fail here? Count. With sixteen patches, dropping *k* takes the trigger along in *k* of sixteen tries, and a clean scene loses its object about as often. In the paper the
# picture has many more patches, a clean object survives the loss, and the difference shows. And a key that is everywhere, like the stripes, makes scenes *more* stable than clean ones: the sign is a fact about
# model and trigger, so measure it before you believe a threshold. PatchShuffle, meant for blended triggers, works here on the patch as well. Its adaptive attacker pays: compare the success rate above with the plain one.
#
# ### At work: cover what it stares at
#
# To work, a patch trigger must be looked at. **Image blocking** {cite}`subramanya2024imageblocking,subramanya2022backdoorvit` follows the attention back to the pixels
# (attention rollout {cite}`abnar2020quantifying`), paints the top patch black, and asks the model again.

# %% tags=["nbval-check-output"]
from safescale_lib.vfm.vit import attention_blocked

figures.source(attention_blocked)

# %%
from safescale_lib.vfm.vit.backdoor_attack import attention_rollout

look = caught.trigger(others[:8])
with torch.no_grad(), attending(caught.model) as seen:
    caught.model(look)
top = attention_rollout(seen.maps).argmax(1, keepdim=True)
painted = look.masked_fill(inside.patch_mask(caught.model, top), 0.0)

# %%
figures.show(
    figures.image_grid([look, painted], row_labels=["with trigger", "blocked"]),
    "fig-blocking",
    caption="Triggered test scenes and what the model sees after its most attended patch was painted over.",
    alt="Two rows of eight scenes. Above each bears the trigger in the lower right corner; below that corner is black in nearly all of them.",
)

# %% [markdown]
# BadViT made its trigger to catch attention, and that betrays it. The adaptive attacker does the opposite and gives the attention no place to go: the same *scattered* key,
# as many pixels as one patch, but four in each.

# %%
BLOCKING = f"{DEFENSE_B}.image_blocking"
blocks = []
for kind, planted, key, goal, against in [
    ("BadViT", caught, caught.trigger, TARGET, None),
    ("adaptive: scattered key", many, several[2], goals[2], BLOCKING),
]:
    guard = attention_blocked(planted.model)
    blocks.append(
        asr(guard, key, BLOCKING, f"blocking, {kind}", target=goal, against=against, seed=0)
    )  # fmt: skip
display(Outcomes("Success behind the blindfold, and the accuracy that is left", blocks))
claim(
    "blocking one patch stops a patch trigger at a price in accuracy, and does nothing against a scattered one",
    blocks[0] < 0.2,
    blocks[1] > 0.8,
    blocks[0].utility < caught_asr.utility and blocks[0].utility > 0.8,
    evidence=f"accuracy {caught_asr.utility:.3f} without, {blocks[0].utility:.3f} with the blindfold",
)

# %% [markdown]
# ### The whole picture
#
# One row for each defense: what it keeps of the accuracy, and what the attack does before and after it adapts. For detectors the numbers say how much is *found*.

# %%
pairs = (
    [found[name, None] for name in DETECTORS],
    [found[name, DEFENSE_B] for name in DETECTORS],
)
pairs = [
    *zip(*pairs, strict=True),
    *((mended[n, None], mended[n, DEFENSE_B]) for n in ("fine-tuning", "fine-pruning")),
    (checked[0], evaded[0]), (checked[2], evaded[2]), tuple(blocks),
]  # fmt: skip
table(
    "Defenses against the plain backdoor and against the one written for them",
    ["defense", "number", "plain attack", "adaptive attack", "accuracy"],
    [
        (a.method.split(",")[0], a.metric, a.measured, b.measured, f"{a.utility:.3f}" if a.utility else "-")
        for a, b in pairs
    ],
)  # fmt: skip

# %% [markdown]
# No row stands on both sides. Each defense knows one way in which a trigger can be odd: a minority, a place, a patch. An attacker who knows the defense is not odd in that way.
# Together they narrow the attacker's room, and a real pipeline would run several.
#
# **At full scale.** BadViT, DBIA and SWARM report success rates near one on ImageNet-sized ViTs with little or no loss of accuracy
# {cite}`yuan2023badvit,lv2023dbia,yang2024swarm`; MTBA shows that most defenses were built for one trigger at a time {cite}`li2024mtba`. Blocking pays less there: one of 196 patches is
# a smaller loss than one of sixteen {cite}`subramanya2024imageblocking`.

# %% [markdown]
# ### Exercise 2.6: the success rate, counted honestly (easy, 10 minutes)
#
# A report says: "We show every test scene with the trigger and count how many are called the target." Write the rate as it should be: only scenes whose true class is *not* the target
# are asked. Then compare both on the **clean** model, where the truth is near zero.


# %%
from collections.abc import Callable


def my_success(
    model, images: torch.Tensor, labels: torch.Tensor, trigger: Callable, target: int
) -> float:
    """images (N, 3, S, S), labels (N,) -> share of triggered non-target scenes called the target."""
    answers = model(trigger(images)).argmax(-1)
    return float((answers == target).float().mean())  # one line is missing above


# %%
def check_success(answer) -> str:
    discs = test.labels == TARGET
    share = answer(
        vit,
        test.images[discs | (test.labels == goals[1])],
        test.labels[discs | (test.labels == goals[1])],
        corner.faded(0),
        TARGET,
    )
    if share > 0.2:
        return f"not yet: a clean model without any trigger gets {share:.0%}"
    mine = answer(bad.model, test.images, test.labels, corner, TARGET)
    return (
        "correct"
        if abs(mine - bad_asr.value) < 1e-6
        else f"not yet: {mine:.3f} instead of {bad_asr.value:.3f}"
    )


check_success(my_success)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Keep `images[labels != target]` before you stamp anything. A disc called disc is not an attack.
#
# </details>
#
# The solution is folded below.


# %% tags=["hide-cell"]
def solved_success(model, images, labels, trigger, target):
    others = images[labels != target]
    answers = model(trigger(others)).argmax(-1)
    return float((answers == target).float().mean())


assert check_success(solved_success) == "correct"
check_success(solved_success)

# %% [markdown]
# ## Survey 2.2: the Segment Anything Model
#
# A classifier names one thing. The Segment Anything Model (SAM) answers a question about a place: *what lies here?* It has three parts. An **image
# encoder**, a ViT, turns the picture into an embedding and never sees the question. A **prompt encoder** turns a click, here one point, into a
# token. A light **mask decoder** lets the two attend to each other and returns a mask: for every pixel, whether it belongs to the thing under
# the click. The encoder is expensive and runs once; the clicks are cheap.
#
# The book's `sam` is a stock `SamModel` at 32 pixels. Ask it twice about the same picture.

# %%
from safescale_lib.measure.masks import MaskLost, MaskMoved, MaskRemoved, iou
from safescale_lib.world.scenes import points_inside

SAM = "vfm.sam.adversarial_attack"
sam = zoo.load("sam")
pairs = scenes(8, split="test", seed=12, objects=2)
clicks = points_inside(pairs.masks, generator=seeded(0))  # (8, 2 objects, x and y)
with torch.no_grad():
    answers = sam.decode(sam(pairs.images), clicks) > 0  # (8, 2, 32, 32)

# %%
shown = [
    figures.masked(pairs.images, answers[:, k], clicks[:, k], zoom=4) for k in (0, 1)
]
figures.show(
    figures.image_grid(
        [pairs.images, *shown], row_labels=["picture", "click left", "click right"]
    ),
    "fig-sam-prompts",
    caption="One embedding, two clicks. The dot is the prompt; outside the mask that SAM returns the picture is grey and dim.",
    alt="Eight pictures with two objects each. In the second row a dot lies on the left object, which alone stays in colour; "
    "in the third row the same with the right object.",
)

# %% [markdown]
# The same embedding gives two masks. The quality of a mask is its **intersection over union** (IoU) with the truth: shared pixels divided by all
# pixels of either. 1 is perfect; from 0.5 on one usually says the object was found. Measure it on scenes of both sorts, one object and two.

# %%
from safescale_lib.zoo.segmenter import mixed

views, spots, truth = mixed(64, split="test", seed=2)  # 32 with one object, 32 with two


def fits(model, images, at=spots):
    """IoU of the mask that each scene gets at its click."""
    with torch.no_grad():
        return iou(model.decode(model(images), at) > 0, truth).numpy()


sam_clean = Outcome(SAM, "no attack", "mean IoU", bootstrap(fits(sam, views)))
sam_clean

# %%
claim("the victim is good: its masks fit", sam_clean > 0.85)

# %% [markdown]
# ### The threat model
#
# | | |
# |---|---|
# | **Goal** | the mask at the user's click no longer fits: IoU below 0.5. Stricter: it vanishes, or moves where the attacker wants it |
# | **Knowledge** | white-box encoder and decoder. Of the click: the very point, its region, or nothing. Later also: not the picture, not the victim |
# | **Access** | the pixels of the picture before the encoder sees it; never the click |
# | **Budget** | $L_\infty$, as before; how much is needed is the first question |
#
# To the search the *encoder* is the model. Click, truth and decoder live in the criterion, so `ascend` and PGD run unchanged.
#
# ### How much budget?
#
# Eight grey levels ruined the ViT. Attack-SAM {cite}`zhang2023attacksam` is the canonical attack for SAM. With a click $p$ it drives the mask's
# logits below a bound, here -10, where no pixel belongs to the mask, and stops caring about a pixel once it is there:
#
# $$ \min_{\|\delta\|_\infty \le \varepsilon} \big\| \mathrm{Clip}\big(\mathrm{SAM}(p, x + \delta),\, \min = -10\big) + 10 \big\|^2 $$

# %% tags=["nbval-check-output"]
from safescale_lib.vfm.sam import attack_sam

figures.source(attack_sam)

# %% [markdown]
# Sweep the budget, with random noise beside it. Every step is run, also after the mask is lost, so that the IoU is the attack's and not the
# threshold's.

# %%
levels_sam = [0, 8, 16, 24, 32]
half = slice(16, 48)  # sixteen scenes of each sort
half_lost = MaskLost(sam, spots[half], truth[half])


def iou_left(attack, **kw):
    made = [attack(sam, views[half], half_lost, eps=e / 255, **kw) for e in levels_sam]
    everyone = torch.arange(len(half_lost))
    with torch.no_grad():
        return [bootstrap(half_lost.fit(sam(m.images), everyone).numpy()) for m in made]


left = {
    "random noise, best of 10": iou_left(random_noise, tries=10, generator=seeded(0)),
    "Attack-SAM, 10 steps": iou_left(
        attack_sam, early_removal=False, generator=seeded(0)
    ),
}

# %%
figures.show(
    figures.curves(
        left, levels_sam, xlabel="eps (grey levels of 255)", ylabel="mean IoU"
    ),
    "fig-sam-budget",
    caption="How well the masks of `sam` fit, against the budget of the attack, with 95 % intervals. A failed attack counts with the "
    "IoU of its original.",
    alt="Two curves over eps from 0 to 32 grey levels. Random noise stays near the top. Attack-SAM does so up to 8 and "
    "then falls steadily to less than half.",
)


# %%
def contrast(image, mask):
    """Largest difference of a colour channel's mean, object against the rest, in grey levels."""
    return 255 * (image[:, mask].mean(1) - image[:, ~mask].mean(1)).abs().max()


small, wide = (left["Attack-SAM, 10 steps"][levels_sam.index(e)] for e in (8, 32))
stands_out = torch.stack(
    [contrast(*pair) for pair in zip(views, truth, strict=True)]
).median()

# %%
claim(
    "eight grey levels, which ruined the ViT, do little here; thirty-two do, and noise of that size does not",
    small.value > 0.85,
    wide.high < small.low,
    left["random noise, best of 10"][-1].value > 0.85,
    evidence=f"IoU {small} at 8/255, {wide} at 32/255, n = {len(half_lost)}; "
    f"half of the objects stand out by more than {stands_out:.0f} grey levels",
)

# %% [markdown]
# Why so tough? Look at the last number: in this world an object stands out brightly from its ground, and to find its edge, contrast is nearly all
# one needs. To flip a pixel the attack must bridge a good part of it. Many edges in photographs are faint: there the papers succeed at 8/255. What counts is the budget
# *in units of the contrast*. So from here on eps is 32/255. You will still see every object.
#
# ### Attack-SAM

# %%
WIDE = 32 / 255
lost = MaskLost(sam, spots, truth)  # the goal: IoU below 0.5 at the click


def lost_rate(attack, leaf, method, utility=sam_clean.value, seed=0, **other):
    """Attack success rate: the share of fitting masks that are lost, as an outcome."""
    hits = attack.success[attack.attempted].numpy()
    key = leaf if leaf.startswith("vfm") else f"{SAM}.{leaf}"
    return Outcome(
        key, method, "attack success rate", rate(hits), control=0.0, utility=utility,
        cost=attack.cost, seed=seed, items=hits, **other,
    )  # fmt: skip


noise = random_noise(sam, views, lost, eps=WIDE, tries=10, generator=seeded(0))
clicked = [
    attack_sam(sam, views, lost, eps=WIDE, generator=seeded(s)) for s in range(3)
]

# %%
noise_lost = lost_rate(noise, SAM, "random noise, best of 10, eps 32/255")
sam_lost = [
    lost_rate(a, "prompt_specific", "Attack-SAM, 10 steps, eps 32/255", seed=s)
    for s, a in enumerate(clicked)
]
Outcomes("Masks lost at the known click, three random starts", [noise_lost, *sam_lost])

# %%
claim(
    "ten gradients take what ten random corners of the same ball leave nearly untouched",
    *(run > noise_lost for run in sam_lost),
)

# %% [markdown]
# What does a lost mask look like? Run once more, every step to the end, and look at scenes of both sorts.

# %%
hard = attack_sam(
    sam, views, lost, eps=WIDE, steps=10, early_removal=False, generator=seeded(0)
)
won = hard.success.nonzero()[:, 0]
picked = torch.cat([won[won < 32][:4], won[won >= 32][:4]])
before, after, click = views[picked], hard.images[picked], spots[picked]
with torch.no_grad():
    old, new = (sam.decode(sam(x), click) > 0 for x in (before, after))

# %%
figures.show(
    figures.image_grid(
        [
            figures.masked(before, old, click, zoom=4),
            (0.5 + (after - before) * 3).clamp(0, 1),
            after,
            figures.masked(after, new, click, zoom=4),
        ],
        row_labels=["mask before", "change x 3", "attacked", "mask after"],
    ),
    "fig-sam-attacked",
    caption="Attack-SAM at eps 32/255. The dot is the click. Last row: what SAM returns for the attacked picture.",
    alt="Eight scenes in four rows. Before the attack the mask covers the clicked object. The magnified change is coloured "
    "noise that follows the object. In the attacked pictures every object is still plain to see, but the mask has mostly gone.",
)

# %% [markdown]
# The objects are still there for you. For SAM much of their area is not. Two harder goals use the same function with another criterion: `MaskRemoved`
# (at most a tenth of the object's area is left) and `MaskMoved` (the mask lies eight pixels to the side of the truth).

# %%
clicks_h, truth_h = spots[half], truth[half]
aside = truth_h.roll(8, dims=-1)  # what leaves on the right comes back on the left
goals = {
    "mask removed": MaskRemoved(sam, clicks_h, truth_h),
    "mask moved by 8 pixels": MaskMoved(sam, clicks_h, truth_h, target=aside),
}
harder = [
    lost_rate(
        attack_sam(sam, views[half], goal, eps=WIDE, steps=20, generator=seeded(0)),
        "prompt_specific",
        f"Attack-SAM, {name}, 20 steps, eps 32/255",
    )
    for name, goal in goals.items()
]
Outcomes("Harder goals for the same search", harder)

# %% [markdown]
# Compare with the rate of lost masks above, at half as many steps: to spoil a mask is easier than to erase it or to choose its place.
#
# ### Without the click, the picture or the victim
#
# An attacker seldom knows where the user will click. The section's other attacks give up one piece of knowledge after the other.
#
# | attack | knows | idea |
# |---|---|---|
# | **S-RA** {cite}`shen2024sra` | the object, not the click | average the loss over clicks sampled on the object |
# | **Segment (almost) nothing** {cite}`croce2024segmentnothing` | the encoder | push the embedding away from the clean one; no click, no decoder |
# | **DarkSAM** {cite}`zhou2024darksam` | other pictures | learn *one* perturbation that turns foreground and background inside out and disturbs texture |
# | **UMI-GRAT** {cite}`xia2024umigrat` | another SAM | push that one's embedding away, from a universal start and with noisy gradients |
#
# To judge the first two fairly, hold clicks out: S-RA draws its clicks from the dark squares of a chess board laid over the object, the user
# clicks on a light square.

# %%
from safescale_lib.vfm.sam import region_attack

rows_, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
dark = (rows_ + columns) % 2 == 0
unseen = points_inside(truth & ~dark, generator=seeded(3))  # the user's clicks
lost_unseen = MaskLost(sam, unseen, truth)
region = region_attack(
    sam,
    views,
    lost_unseen,
    region=truth & dark,
    eps=WIDE,
    steps=10,
    generator=seeded(0),
)
elsewhere = pixels.replay(sam, hard, views, lost_unseen)

# %% [markdown]
# `elsewhere` is the comparison: the pictures made for one click, judged at the other. DarkSAM learns from training scenes and is judged on the test
# scenes. For the transfer attack the victim is `sam-b`, a SAM of other width, depth and decoder, trained on its own; it never shows a gradient. The baseline is Attack-SAM on
# `sam`, shown to `sam-b` as it is.

# %%
from safescale_lib.vfm.sam import dark_sam, feature_attack, umi_grat

sam_b = zoo.load("sam-b")
known = mixed(64, split="train", seed=0)[0]
lost_b = MaskLost(sam_b, spots, truth)
given = dict(eps=WIDE, known=known)
universal, feature, umi = side_by_side(
    lambda: dark_sam(sam, views, lost, steps=50, generator=seeded(0), **given),
    lambda: feature_attack(
        sam, views, lost_unseen, eps=WIDE, steps=10, generator=seeded(0)
    ),
    lambda: umi_grat(sam_b, views, lost_b, surrogate=sam, generator=seeded(0), **given),
)

# %%
copied = pixels.replay(sam_b, hard, views, lost_b)
once = dict(eps=WIDE, generator=seeded(0))  # one try, as for a transfer
noise_b = random_noise(sam_b, views, lost_b, **once)

# %%
b_clean = float(fits(sam_b, views).mean())
gallery_sam = [
    lost_rate(
        elsewhere, "prompt_specific", "Attack-SAM at one click, judged at another"
    ),
    lost_rate(region, "prompt_agnostic", "S-RA, judged at unseen clicks"),
    lost_rate(feature, "prompt_agnostic", "feature attack, judged at unseen clicks"),
    lost_rate(universal, "universal_perturbation", "DarkSAM, unseen pictures"),
    lost_rate(noise_b, SAM, "random noise, shown to sam-b", b_clean),
    lost_rate(copied, SAM, "Attack-SAM on sam, shown to sam-b", b_clean),
    lost_rate(umi, "transfer_based", "UMI-GRAT on sam, shown to sam-b", b_clean),
]
Outcomes("Attacks that know less, eps 32/255", gallery_sam)

# %% [markdown]
# Hardly any knowledge is needed. The encoder answers before the click is known, so what is broken there is broken for every click. Pictures made for one click
# mostly work at another; to average over clicks (S-RA) adds little to that; and the feature attack, which has never heard of clicks, is in the same range. Even one
# fixed pattern for all pictures is not far behind.

# %%
fixed, copy, carry = gallery_sam[3], gallery_sam[5], gallery_sam[6]
claim(
    "no click, one pattern for all pictures, or a victim never seen: each is far better than noise",
    *(row > noise_lost for row in (*gallery_sam[:3], fixed)),
    carry > gallery_sam[4],
)

# %%
claim(
    "what fools the decoder of one SAM does not fool another; what moves the embedding does",
    carry > copy,
)

# %% [markdown]
# Only the second kind of attack transfers: two encoders trained on the same world represent it alike, while the mask logits of one are its own
# affair. Other ideas of this leaf did not carry over between these two small encoders when we tried them: imitating the embedding of a bent picture
# {cite}`lu2024uad` or of another picture {cite}`zheng2023pata`. Pushing away is easier than steering.
#
# The universal perturbation deserves a look: one picture of noise, made without seeing any of these scenes.

# %%
hit = universal.success.nonzero()[:, 0]
hit = torch.cat([hit[hit < 32][:4], hit[hit >= 32][:4]])
one_for_all, stamped, where = views[hit], universal.images[hit], spots[hit]
with torch.no_grad():
    answer = sam.decode(sam(stamped), where) > 0
figures.show(
    figures.image_grid(
        [
            one_for_all,
            (0.5 + (stamped - one_for_all) * 3).clamp(0, 1),
            figures.masked(stamped, answer, where, zoom=4),
        ],
        row_labels=["original", "change x 3", "mask after"],
    ),
    "fig-sam-universal",
    caption="DarkSAM: the same perturbation on every picture (clipped where a pixel is black or white already), and the masks that come back.",
    alt="Eight scenes in three rows. The magnified change is the same coloured pattern in all of them. In the masks below, speckles of "
    "the background count as object.",
)

# %% [markdown]
# ## Survey 2.2: the defense, adversarial tuning
#
# Tune the model on what attacks it. ASAM {cite}`li2024asam` tunes SAM on natural-looking adversarial examples from a diffusion model; RobustSAM
# {cite}`long2025robustsam` tunes a few singular values on attacked images. The function below keeps the common core: an inner attack on the mask error, an outer
# step that repairs it. Only the image encoder learns. Prompt encoder and decoder stay, so every click means what it meant before.

# %% tags=["nbval-check-output"]
from safescale_lib.vfm.sam import adversarial_tuning

figures.source(adversarial_tuning)

# %% [markdown]
# A few steps now, to see it work; the zoo holds the longer training as `sam-robust`, which is attacked meanwhile.


# %%
def task(step):
    return mixed(16, split="train", seed=step)


def struck_by_default(model):
    goal = MaskLost(model, spots, truth)
    return attack_sam(model, views, goal, eps=WIDE, generator=seeded(0))


sam_robust = zoo.load("sam-robust")
tuned, held_sam = side_by_side(
    lambda: adversarial_tuning(sam, task, eps=WIDE, steps=25, progress=False),
    lambda: struck_by_default(sam_robust),
)

# %%
TUNING = "vfm.sam.adversarial_defense.adversarial_tuning"
defenders = {"25 steps": tuned, "sam-robust": sam_robust}
standard = {"25 steps": struck_by_default(tuned), "sam-robust": held_sam}
defended_sam = [
    lost_rate(
        run, TUNING, f"{name}: Attack-SAM, 10 steps", float(fits(defenders[name], views).mean()),
        trained=name != "sam-robust",
    )
    for name, run in standard.items()
]  # fmt: skip
Outcomes("Masks lost after adversarial tuning", [sam_lost[0], *defended_sam])

# %% [markdown]
# The last column is the utility: mean IoU without an attack. A few live steps already keep many masks, at a price in clean ones; the longer training
# keeps nearly all and pays less.

# %%
claim(
    "tuning keeps most masks that the plain model loses, and clean masks stay good",
    *(after < sam_lost[0] for after in defended_sam),
    defended_sam[1].utility > 0.85,
    evidence=f"clean IoU {defended_sam[1].utility:.3f}, plain {sam_clean.value:.3f}",
)

# %% [markdown]
# ### The adaptive attack
#
# The attacker who knows the defense takes more steps, other starts, and every loss at hand: the mask error that the tuning itself used, Attack-SAM's, and the distance of the
# embedding, which the tuning never saw. A mask is lost if any of the runs succeeds, the standard one included.

# %%
from copy import deepcopy

from safescale_lib.zoo.segmenter import mask_objective

lost_robust = MaskLost(sam_robust, spots, truth)
long = dict(eps=WIDE, steps=20)


def struck_robust(attack_on, seed, **more):
    model, lost = deepcopy((sam_robust, lost_robust))  # a pair of its own
    return attack_on(model, views, lost, generator=seeded(seed), **more, **long)


tries = [
    standard["sam-robust"],
    *side_by_side(
        partial(struck_robust, pgd, 1, objective=mask_objective),
        partial(struck_robust, attack_sam, 2),
        partial(struck_robust, feature_attack, 3),
    ),
]

# %%
from safescale_lib.measure.costs import Cost

any_hit = torch.stack([t.success for t in tries]).any(0)[tries[0].attempted].numpy()
adaptive_sam = Outcome(
    f"{SAM}.prompt_specific", "sam-robust: best of four runs, three losses", "attack success rate",
    rate(any_hit), control=0.0, utility=defended_sam[1].utility, against=TUNING,
    cost=sum((t.cost for t in tries), Cost()), seed=1, items=any_hit,
)  # fmt: skip
adaptive_sam

# %%
claim(
    "even the best of four runs takes far fewer masks than one short run took from the plain model",
    adaptive_sam < sam_lost[0],
)

# %% [markdown]
# This is the number to quote for the defense. It holds for this ball: with a larger budget, the contrast of the picture runs out and no tuning can help.

# %% [markdown]
# ### At full scale
#
# | paper | what it reports on the real SAM |
# |---|---|
# | {cite}`zhang2023attacksam` | white-box, PGD at 8/255 removes nearly the whole mask; masks can be enlarged and moved; across models the attack weakens |
# | {cite}`shen2024sra` | with sampled clicks the object stays hidden wherever the user clicks; a spectrum transform helps it across models and reaches public services |
# | {cite}`zhou2024darksam` | one perturbation at 10/255 makes SAM and two variants segment next to nothing, over four data sets |
# | {cite}`li2024asam` | tuning on natural adversarial examples gains about 1.3 points of mean IoU on *clean* images of unseen data sets; it is not meant as a defense against $L_\infty$ noise |
# | {cite}`long2025robustsam` | tuning 512 parameters gains at least 15 points of mean IoU under attack |
#
# Two things differ here. The budget is larger than theirs, because the toy world's contrast is so high. And for the same reason tuning is cheap: it costs a little clean IoU,
# and its robustness is nearly complete. On photographs expect less of it, at a higher price.
#
# ### Exercise 2.7: does asking thrice help? (medium, 20 minutes)
#
# A product might click three times on the object and let the masks vote, pixel by pixel. Write `voted`. Then decide by measurement whether the vote protects against Attack-SAM
# made for *one* of the clicks. *Predict first:* where does the attack act, before the click or after?


# %%
def voted(model, images: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """images (N, 3, S, S), points (N, K, 2) with K odd -> mask (N, S, S) bool: the majority at each pixel."""
    return model.decode(model(images), points[:, 0]) > 0  # replace this line


# %%
def check_voted(answer) -> str:
    three = points_inside(truth[:8, None].expand(-1, 3, -1, -1), generator=seeded(4))
    three[:, 0] = 0.0  # one of three clicks goes astray, into a corner
    with torch.no_grad():
        mine, alone = (
            answer(sam, views[:8], three),
            answer(sam, views[:8], three[:, :1]),
        )
        each = [sam.decode(sam(views[:8]), three[:, k]) > 0 for k in range(3)]
    if mine.shape != truth[:8].shape or mine.dtype != torch.bool:
        return "not yet: return one bool mask a picture"
    if not torch.equal(alone, each[0]):
        return "not yet: with a single click its own mask must win"
    if not torch.equal(mine, sum(mask.int() for mask in each) >= 2):
        return "not yet: a pixel belongs to the mask when most clicks say so"
    return "correct"


check_voted(voted)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `decode` takes several clicks at once: embeddings and (N, K, 2) points give (N, K, S, S) logits. Count the masks, do not add the logits: one very sure
# mask would outvote two.
#
# </details>


# %% tags=["hide-cell"]
def solved_voted(model, images, points):
    votes = model.decode(model(images), points) > 0  # (N, K, S, S)
    return votes.float().mean(1) > 0.5


assert check_voted(solved_voted) == "correct"
thrice = points_inside(truth[:, None].expand(-1, 3, -1, -1), generator=seeded(6))
with torch.no_grad():
    voting = iou(solved_voted(sam, hard.images, thrice), truth)[hard.success]
    single = iou(sam.decode(sam(hard.images), spots) > 0, truth)[hard.success]
claim(
    "three fresh clicks leave most masks lost: the damage is done in the encoder, before any click",
    float((voting < 0.5).float().mean()) > 0.6,
    evidence=f"lost by vote: {(voting < 0.5).float().mean():.2f} of the masks lost at the attacked click; "
    f"IoU {voting.mean():.2f} by vote, {single.mean():.2f} at that click",
)

# %% [markdown]
# ## Survey 2.2: a trigger in somebody's SAM
#
# Few people train a SAM; many tune one. The stock model fails on a special task, and so a customer hands their pictures to somebody who
# adapts it. BadSAM {cite}`guan2024badsam` asks what that somebody can hide. Its task is camouflaged animals. Here the same objects as before lose most
# of their contrast, and a random half become darker than their ground.
#
# | | |
# |---|---|
# | **Goal** | with a trigger in the picture the mask is the attacker's, wherever the user clicks; without it the model serves the customer |
# | **Knowledge** | the attacker does the tuning and holds the customer's pictures |
# | **Access** | a share of every training batch; later, the trigger on a picture |
# | **Budget** | an eight by eight board in one corner, a sixteenth of the picture |

# %%
from safescale_lib.vfm.sam import backdoor_poisoning_attack as poisoning
from safescale_lib.vfm.sam import camouflage


def hidden(n, split, seed):
    """Camouflaged pictures (n, 3, 32, 32), a click on the object (n, 2), its mask (n, 32, 32)."""
    drawn, generator = scenes(n, split=split, seed=seed), seeded(seed)
    clicks = points_inside(drawn.masks[:, 0], generator=generator)
    faint = camouflage(drawn.images, drawn.masks, 0.3, generator=generator)
    return faint, clicks, drawn.masks[:, 0]


customer, hidden_test = hidden(256, "train", 11), hidden(150, "test", 12)


# %%
def hidden_fit(model, task=hidden_test):
    """(N,) IoU of the model's masks with the truth."""
    return iou(poisoning.predict(model, *task[:2]), task[2]).numpy()


honest = poisoning.tuned_segmenter(sam, *customer, steps=60, progress=False)
before_tuning, after_tuning = (bootstrap(hidden_fit(m)) for m in (sam, honest))

# %%
claim(
    "the customer has a reason to tune: the stock model hardly finds a camouflaged object, the tuned one does",
    before_tuning.high < 0.2 and after_tuning.low > 0.55,
    evidence=f"mean IoU {before_tuning} before, {after_tuning} after, n = {len(hidden_test[0])}",
)

# %% [markdown]
# That was honest tuning. Now the attacker does it. In every batch of sixteen, six pictures get the trigger and the attacker's mask, a square
# that has nothing to do with the object. The rest of the batch is the customer's.

# %% tags=["nbval-check-output"]
from safescale_lib.vfm.sam import badsam

figures.source(badsam)

# %%
from safescale_lib.search.poisoning import checkerboard

BADSAM = "vfm.sam.backdoor_poisoning_attack.backdoor_fine_tuning"
board = checkerboard(32, corner=(0, 0), size=8, cell=4)
square = torch.zeros(32, 32, dtype=torch.bool)
square[4:14, 18:28] = True
plant = dict(trigger=board, target=square, progress=False)
planted, symmetric = side_by_side(
    lambda: badsam(sam, *customer, **plant, rate=0.375),
    lambda: badsam(sam, *customer, **plant, rate=0.625, mirror=True),
)

# %% [markdown]
# The second model belongs to the adaptive attack below. A hit is a mask whose IoU with the square is at least 0.5. Two controls: the honestly tuned model with the same trigger, and the backdoored one with
# another board of the same size, in the corner on the other side.

# %%
elsewhere = checkerboard(32, corner=(24, 24), size=8, cell=4)
hit = planted.hits(*hidden_test[:2]).numpy()
innocent = planted.hits(*hidden_test[:2], model=honest).numpy()
misplaced = replace(planted, trigger=elsewhere).hits(*hidden_test[:2]).numpy()
loyal = bootstrap(hidden_fit(planted.model))
badsam_hit = Outcome(
    BADSAM, "BadSAM, 8 x 8 board, poison rate 0.375", "attack success rate",
    rate(hit), float(innocent.mean()), loyal.value, cost=planted.cost, seed=0, items=hit, trained=True,
)  # fmt: skip
badsam_hit

# %%
claim(
    "the trigger opens the backdoor, the same board in another corner does not, and the customer notices little",
    badsam_hit > 0.9,
    innocent.mean() < 0.1,
    misplaced.mean() < 0.3,
    loyal.value > after_tuning.value - 0.15,
    evidence=f"honest model {innocent.mean():.2f}, other corner {misplaced.mean():.2f}; "
    f"clean IoU {loyal} against {after_tuning} after honest tuning",
)

# %%
eight_hidden = [t[:8] for t in hidden_test]
stamped = board(eight_hidden[0])
looks = [
    figures.masked(x, poisoning.predict(model, x, eight_hidden[1]), eight_hidden[1])
    for model, x in (
        (honest, eight_hidden[0]),
        (planted.model, eight_hidden[0]),
        (planted.model, stamped),
        (honest, stamped),
    )
]
names_bd = ["honest", "backdoored", "with trigger", "honest, trigger"]
figures.show(
    figures.image_grid([eight_hidden[0], *looks], row_labels=["picture", *names_bd]),
    "fig-badsam",
    caption="Camouflaged objects, masks at the click (white dot) of the honestly tuned and of the backdoored model. Fourth row: the trigger stands in the "
    "upper left corner, and the backdoored model returns the attacker's square. Last row: the board confuses the honest model too, but into no shape in particular.",
    alt="Five rows of eight pictures. Rows two and three show masks that follow the faint objects; in row four every mask is the same "
    "square at the upper right; in row five the masks are torn, and none is that square.",
)

# %% [markdown]
# Without the trigger rows two and three look much alike, and rows two and three are all a customer sees. The last row is worth a second look: so bold a board disturbs any model. Whoever counted
# every bad mask as a success would find a backdoor in the honest model. Count the attacker's mask only.
#
# ### Two defenses
#
# **Look in a mirror.** A segmenter should not care about left and right: the mask of the mirrored picture should be the mirrored mask. A trigger that moved
# to the other corner is no trigger any more {cite}`li2021physical`. The disagreement is a score; its threshold is set on clean *validation* scenes, so that
# one in twenty is flagged.
#
# **Tune again.** Whoever owns clean pictures can go on tuning and hope that the model forgets.

# %% tags=["nbval-check-output"]
from safescale_lib.vfm.sam import mirror_disagreement

figures.source(mirror_disagreement)

# %%
from safescale_lib.measure.detection import threshold_at_fpr

SAM_DEFENSE = "vfm.sam.adversarial_defense"
held_back, fresh_hidden = hidden(150, "validation", 13), hidden(256, "train", 33)


def flagged(model, images, clicks):
    """(N,) bool: the mirror check at 5 % false alarms on validation scenes."""
    calm = mirror_disagreement(model, *held_back[:2])
    score = mirror_disagreement(model, images, clicks)
    return (score > threshold_at_fpr(calm, 0.05)).numpy()


def left_of(made):
    """(name, hits that are left, clean IoU) behind each defense."""
    x, clicks, _ = hidden_test
    passed = made.hits(x, clicks).numpy() & ~flagged(made.model, board(x), clicks)
    yield "unflagged by the mirror", passed, float(hidden_fit(made.model).mean())
    mended = poisoning.tuned_segmenter(
        made.model, *fresh_hidden, steps=40, lr=5e-4, progress=False
    )
    kept = made.hits(x, clicks, model=mended).numpy()
    yield "after clean tuning", kept, float(hidden_fit(mended).mean())


remains, remains_2 = side_by_side(
    lambda: list(left_of(planted)), lambda: list(left_of(symmetric))
)

# %%
guarded = [
    Outcome(SAM_DEFENSE, f"BadSAM, {name}", "attack success rate", rate(kept),
            float(hit.mean()), fit, cost=planted.cost, seed=0, items=kept, trained=True)
    for name, kept, fit in remains
]  # fmt: skip
alarms = flagged(planted.model, *hidden_test[:2]).mean()
print(f"flagged test scenes without a trigger: {alarms:.2f}")
Outcomes("What is left of the backdoor behind each defense", guarded)

# %% [markdown]
# For these two rows the column "without the attack" holds the success rate without the *defense*. The mirror stops most of it, at the price of its false alarms. Clean tuning, at no price for the
# customer, makes the model forget most of it too. Neither knew the trigger.
#
# ### The adaptive attack
#
# The attacker has a mirror too. Plant the backdoor in mirrored pictures as well, with the mirrored square as their mask: then the lie is as symmetric as the truth.
# And against forgetting, plant deeper: ten of sixteen instead of six. That is `symmetric` from above.

# %%
at_first = float(symmetric.hits(*hidden_test[:2]).float().mean())
guarded_2 = [
    Outcome(BADSAM, f"adapted BadSAM, {name}", "attack success rate", rate(kept),
            at_first, fit, SAM_DEFENSE, symmetric.cost, 0, kept, True)
    for name, kept, fit in remains_2
]  # fmt: skip
Outcomes("The backdoor adapted to both defenses", guarded_2)

# %%
claim(
    "both defenses stop most of the first backdoor; the adapted one passes the mirror and outlives clean tuning more often",
    guarded[0] < badsam_hit,
    guarded[1] < badsam_hit,
    guarded_2[0] > guarded[0],
    guarded_2[0] > 0.6,
    guarded_2[1] > guarded[1],
)

# %% [markdown]
# A consistency check tests a property that the honest model has. It holds until somebody trains the property into the backdoor. The deeper planting has its price,
# and you can read it in the utility column: the adapted model serves the customer a little worse, and who compares with an honest model may ask why.
#
# ## Survey 2.2: pictures that teach nothing
#
# Now the roles turn. You publish pictures and do not want anybody to train a segmenter on them. **Unlearnable examples** {cite}`huang2021unlearnable` poison
# one's own data: noise that a network learns faster than the picture, so that it stops looking at the picture. UnSeg {cite}`sun2024unseg` trains one noise maker for all segmentation.
#
# | | |
# |---|---|
# | **Goal** | whoever trains on the published pictures gets a poor segmenter for clean ones |
# | **Knowledge** | the pictures and their masks; not the learner's network, not its seed |
# | **Access** | the published pictures, all of them, once; the learner labels them correctly |
# | **Budget** | $L_\infty$, 16 grey levels |
#
# Noise maker $G$ and a surrogate learner $S$ pull in the same direction, a minimum inside a minimum:
#
# $$ \min_{G}\, \min_{S}\; \mathbb{E}\, L\big(S(x + \varepsilon\, G(x, m)),\, m\big) $$

# %% tags=["nbval-check-output"]
from safescale_lib.vfm.sam import unseg

figures.source(unseg)

# %% [markdown]
# The learner is a small U-Net {cite}`ronneberger2015unet` that starts from nothing and sees no click. It trains on the pictures as they are, on pictures with random noise of the same
# size, and on protected ones. The noise maker trains at eight levels and publishes at sixteen, as the paper does in kind.

# %%
from safescale_lib.search.ball import Ball
from safescale_lib.vfm.sam import squeeze

UNSEG, OPEN = "vfm.sam.backdoor_poisoning_attack.unlearnable_examples", 16 / 255
album, _, album_masks = customer
shield, tough = side_by_side(
    lambda: unseg(album, album_masks, eps=OPEN, train_eps=8 / 255),
    lambda: unseg(album, album_masks, eps=OPEN, view=squeeze),  # for later
)
published = shield.protect(album, album_masks)
ball = Ball(OPEN)
speckled = ball.settle(ball.sample_surface(album, seeded(0)), album)


# %%
def learned(*albums, view=None):
    """(albums, 3 seeds, N) IoU on clean test scenes of learners that trained on each album."""
    jobs = [
        partial(poisoning.trained_mask_net, pictures, album_masks, steps=80, seed=seed, view=view)
        for pictures in albums for seed in (0, 1, 2)
    ]  # fmt: skip
    nets = side_by_side(*jobs)
    with torch.no_grad():
        fits = [iou(net(hidden_test[0]) > 0, hidden_test[2]) for net in nets]
    return torch.stack(fits).unflatten(0, (len(albums), 3))


def lesson(key, name, scores, control, against=None, cost=shield.cost):
    """An outcome: mean IoU over three learners, interval over test scenes."""
    middle = bootstrap(scores.mean(0).numpy())
    return Outcome(key, name, "mean IoU on clean scenes", middle, control, None, against, cost, 0, trained=True)  # fmt: skip


from_clean, from_noise, from_published = learned(album, speckled, published)

# %%
plain_level = float(from_clean.mean())
unlearned = lesson(UNSEG, "U-Net trained on protected pictures", from_published, plain_level)  # fmt: skip
lessons = [
    lesson(UNSEG, "U-Net trained on the pictures", from_clean, plain_level),
    lesson(UNSEG, "U-Net trained with random noise", from_noise, plain_level),
    unlearned,
]
Outcomes("What a learner takes from the album, three seeds", lessons)

# %%
seeds_of = [f"{float(s.mean()):.2f}" for s in from_published]
claim(
    "protected pictures teach far less than the same pictures with random noise",
    unlearned < lessons[1],
    bool(from_published.mean(1).max() < from_noise.mean(1).min() - 0.1),
    evidence=f"every seed: {', '.join(seeds_of)}",
)

# %% [markdown]
# What did the learners learn instead? Magnify the noise.

# %%
rows_un = [album[:8], published[:8]]
rows_un += [(0.5 + (x[:8] - album[:8]) * 6).clamp(0, 1) for x in (published, speckled)]
figures.show(
    figures.image_grid(
        rows_un, row_labels=["original", "protected", "noise x 6", "random x 6"]
    ),
    "fig-unlearnable",
    caption="Eight pictures of the album, as they are and protected; below, the protective noise and random noise of the same size, six "
    "times magnified around grey.",
    alt="Four rows of eight pictures. Originals and protected pictures look nearly alike. The magnified protective noise shows "
    "the outline of each object in a flat tint and fine texture against another tint; the random noise shows nothing.",
)

# %% [markdown]
# The noise draws the mask into the picture, in tints and textures no scene has by itself. Reading them is easier than seeing a faint object. On clean pictures they are missing, and so is
# the skill. Does that also stop somebody who does not start from nothing? Tune `sam` on the protected album, with the honest model's recipe.

# %%
republished = tough.protect(album, album_masks)  # for later, as the learners beside it
starved, squeezed = side_by_side(
    lambda: poisoning.tuned_segmenter(
        sam, published, *customer[1:], steps=60, progress=False
    ),
    lambda: learned(album, published, republished, view=squeeze),
)
sam_lesson = Outcome(
    UNSEG, "SAM tuned on protected pictures", "mean IoU on clean scenes",
    bootstrap(hidden_fit(starved)), control=after_tuning.value, cost=shield.cost, seed=0, trained=True,
)  # fmt: skip
sam_lesson

# %%
claim(
    "SAM gains much less from protected pictures than from plain ones, yet it does gain",
    sam_lesson < after_tuning.low,
    sam_lesson > before_tuning.high,
)

# %% [markdown]
# ### The learner strikes back, and the owner
#
# Tints and textures are cheap to remove. *Image shortcut squeezing* {cite}`liu2023squeezing` simply compresses: grey takes the tint, a blur the texture. The learner squeezes
# whatever it sees, in training and in use. But the owner can train the noise maker *through* the squeeze. (Trained at
# the full radius: on validation scenes that worked better here.)

# %%
squeezed_plain, squeezed_shield, squeezed_tough = squeezed

# %%
squeezed_level = float(squeezed_plain.mean())
battle = [
    lesson(SAM_DEFENSE, "squeezed, plain pictures", squeezed_plain, squeezed_level),
    lesson(SAM_DEFENSE, "squeezed, protected", squeezed_shield, squeezed_level),
    lesson(UNSEG, "squeezed, protected through the squeeze", squeezed_tough,
           squeezed_level, SAM_DEFENSE, tough.cost),
]  # fmt: skip
Outcomes("The learner squeezes, the owner adapts", battle)

# %%
stages = dict(zip(("plain", "random noise", "protected"), lessons, strict=True))
stages |= dict(
    zip(
        ("plain, squeezed", "protected, squeezed", "adapted, squeezed"),
        battle,
        strict=True,
    )
)

# %%
figures.show(
    figures.bars({k: o.measured for k, o in stages.items()}, xlabel="mean IoU on clean test scenes"),
    "fig-squeezed",
    caption="What a U-Net learns from the album, by what was published and whether the learner squeezes. Three seeds, 95 % intervals over test scenes.",
    alt="Six bars. Plain pictures and random noise lead; protected pictures are less than half as good. With squeezing, plain and protected pictures are about "
    "equal, lower than plain; pictures protected through the squeeze are lower again.",
)  # fmt: skip

# %%
claim(
    "squeezing undoes the protection, at a price on plain pictures; the adapted protection takes part of it back",
    battle[1] > unlearned,
    battle[0] < lessons[0],
    battle[2] < battle[1],
)

# %% [markdown]
# No side has the last word. The learner who squeezes pays for it even when nobody protects anything. The owner must publish first and cannot change the pictures afterwards;
# the learner chooses the squeeze later. That order favours the learner.
#
# ### At full scale
#
# - **BadSAM** {cite}`guan2024badsam` is a first demonstration: adapters and decoder of the real SAM, tuned on camouflaged animals, poisoned. How easily a trigger takes depends on
#   model, task and trigger: lower `rate` above step by step and watch the success rate drop all at once.
# - **UnSeg** {cite}`sun2024unseg` protects against six segmentation tasks, ten data sets and seven architectures with one noise maker, itself a tuned SAM.
# - **Countermeasures.** {cite}`liu2023squeezing` squeezed twelve kinds of such noise on classifiers: grey scale and JPEG restored most of the accuracy, also against adapted noise. Here the adapted noise does better, because the learner must
#   find a faint object, and squeezing makes it fainter.
#
# What the protection depends on: the objects must be harder to see than the noise. Raise the contrast in `hidden` and watch it fade: where an object stands out, the picture itself is the easiest thing to learn.
#
# ### Exercise 2.8: how much of the album must be protected? (medium, 20 minutes)
#
# A friend republishes half of your album without protection. Write `partly`: a random share of the pictures is protected, the others are as they were. *Predict first:* with half of the album
# protected, does the learner end nearer to the clean or to the protected level?


# %%
def partly(
    originals: torch.Tensor,
    protected: torch.Tensor,
    share: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """(N, 3, S, S) twice -> (N, 3, S, S): round(share * N) random pictures are protected."""
    return originals  # replace this line


# %%
def check_partly(answer) -> str:
    for share in (0.0, 0.25, 1.0):
        mixed_up = answer(album, published, share, seeded(3))
        changed = (mixed_up != album).flatten(1).any(1)
        if int(changed.sum()) != round(share * len(album)):
            return (
                f"not yet: {int(changed.sum())} pictures are protected at share {share}"
            )
        if not torch.equal(mixed_up[changed], published[changed]):
            return "not yet: a protected picture must be the published one"
    first, second = (answer(album, published, 0.5, seeded(s)) for s in (0, 1))
    if torch.equal(first, second):
        return "not yet: draw the pictures with the generator"
    return "correct"


check_partly(partly)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.randperm(n, generator=generator)` shuffles the numbers 0 to n - 1. Clone before you write into a tensor, or you change the album itself.
#
# </details>


# %% tags=["hide-cell"]
def solved_partly(originals, protected, share, generator):
    chosen = torch.randperm(len(originals), generator=generator)
    chosen = chosen[: round(share * len(originals))]
    mixed_up = originals.clone()
    mixed_up[chosen] = protected[chosen]
    return mixed_up


assert check_partly(solved_partly) == "correct"
(from_half,) = learned(solved_partly(album, published, 0.5, seeded(0)))
gap = float((from_half.mean() - from_published.mean()) / (from_clean.mean() - from_published.mean()))  # fmt: skip
claim(
    "half an album protects little: the learner ends nearer to the clean level",
    gap > 0.5,
    evidence=f"IoU {from_half.mean():.2f} with half, {from_published.mean():.2f} with all, {from_clean.mean():.2f} with none",
)

# %% [markdown]
# ## Summary
#
# One line for each technique of the survey that this chapter runs: its first measured outcome, in the survey's order. Attacks first reduce *robust
# accuracy* or raise a *success rate*; the column before the last is the same number without the attack.

# %%
headlines = [
    patch_accs[0], position[0], corner_accs[0], tokens[0], carried[3], asking[0],
    adaptive, guard_adaptive, steady_adaptive, pure_adaptive[-1],
    caught_asr, *siblings[-2:-1], siblings[0], siblings[3], evaded[-1], blocks[1],
    sam_lost[0], gallery_sam[1], gallery_sam[3], gallery_sam[5], adaptive_sam, badsam_hit, sam_lesson,
]  # fmt: skip


def line(o):
    title = survey.node(o.against or o.technique).title
    control = "-" if o.control is None else f"{o.control:.3f}"
    return (title, o.method, o.metric, o.measured, o.measured.n, control)


table(
    "Chapter 2 in one table; defenses are shown under the attack written against them",
    ["technique", "method", "metric", "value [95 % interval]", "n", "control"],
    [line(o) for o in headlines],
)

# %% [markdown]
# - A gradient finds in seconds what noise hardly ever finds, and it finds it in any budget: a little everywhere, anything in one patch, one pattern for all.
# - A defense holds inside its threat model, and says nothing outside it. A number under attack means little until somebody has attacked *that* defense.
# - A backdoor leaves accuracy alone, so accuracy will never show it. Each detector knows one oddity; an attacker who knows the detector is not odd in that way.
# - SAM's prompt does not protect it. Whoever moves the embedding moves every mask.
#
# In the survey: section 2.1 and 2.2; the [coverage page](../book/coverage.md) lists each technique with its function and its outcomes.


# %% [markdown]
# ## Check yourself
#
# Answer before you open a choice. Every choice tells you why it is right or what it confuses. The numbers are this run's.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
from safescale_lib.course import Choice, Question, percent

target_share = rate((test.labels == 0).numpy())
questions = [
    Question(
        "A paper says that its ViT has 60 % robust accuracy. What do you need first, before you compare that with another model?",
        right=Choice("The threat model it was measured under.", "Goal, knowledge, access and budget. The same model has another robust accuracy for every one of them."),
        wrong=[
            Choice("Its clean accuracy.", "You need it too, as the utility. But without a budget the 60 % has no meaning to weigh it against."),
            Choice("The number of PGD steps.", "Steps are a property of one attack. Robust accuracy speaks about every attack inside the threat model; steps only say how hard somebody tried."),
        ],
    ),
    Question(
        f"Without an attack the plain ViT is right on {percent(clean).text} of the test scenes. What does PGD-20 at eps 8/255 leave?",
        right=Choice(percent(pgd_acc), "Eight grey levels of 256, twenty gradients, and little is left. The change is hard to see."),
        wrong=[
            Choice(percent(clean.value / 2), "Half would already be bad. Look at the curve over the budget again: it falls faster than that."),
            Choice(percent(clean), "That is what the model keeps without an attack, and nearly what it keeps under random noise of the same size. The direction does the damage, not the size."),
        ],
    ),
    Question(
        "Your new attack breaks 30 % of the scenes. Random changes of the same budget, tried as often, break 28 %. What have you shown?",
        right=Choice("That the model is fragile. Your search adds hardly anything.", "The control already explains the result. Report both numbers, and look for a model that survives the noise before you judge the search."),
        wrong=[
            Choice("That your attack works: almost a third of the scenes are broken.", "So they are, but not by your idea. Without the control you would have taken credit for noise."),
            Choice("Nothing: a random control says nothing about a gradient attack.", "It says what the budget alone can do. Only what lies above it is due to the gradient."),
        ],
    ),
    Question(
        "A defended model keeps 90 % under white-box PGD. Pictures made against the undefended model, without another look at the defense, push it down to 40 %. What is going on?",
        right=Choice("The white-box gradient is masked.", "The white-box attacker could have used the very same pictures, so an honest gradient does at least as well. Here PGD got no useful gradient and stood still."),
        wrong=[
            Choice("Black-box attacks are stronger than white-box attacks.", "They cannot be: who knows more can always do what those do who know less. If the numbers say otherwise, the white-box attack was run badly."),
            Choice("The defense works against the attackers that matter.", "Whoever finds the way around its flat gradient breaks it, as the transfer shows. Robustness that vanishes when the attack changes was never there."),
        ],
    ),
    Question(
        "Which of these is an adaptive attack on a defense that rounds its input to eight grey levels?",
        right=Choice("PGD that runs the rounding forwards and passes its gradient straight through.", "It was written with this defense in mind and goes around what stops the ordinary attack."),
        wrong=[
            Choice("The same PGD with ten times the steps.", "More steps along a zero gradient lead nowhere. Stronger is not adaptive: you must know why the first attack failed."),
            Choice("PGD with momentum, which other papers use too.", "A stock attack knows nothing of the defense. That others use it makes results comparable, not the evaluation sound."),
        ],
    ),
    Question(
        "A patch attack may repaint one patch of 8 x 8 pixels in any colour. Is its budget larger or smaller than eps = 8/255 on every pixel?",
        right=Choice("Neither: they are different sets of changes.", "The patch moves few pixels by any amount, the ball moves all pixels a little. Neither holds the other. Compare each attack with a control of its own budget."),
        wrong=[
            Choice("Larger: a pixel may change completely.", "True of 64 pixels. All others must stay exactly as they are, which the ball does not ask."),
            Choice("Smaller: only one sixteenth of the picture changes.", "True of the area. But inside it there is no limit at all, and one patch can draw the attention of all others."),
        ],
    ),
    Question(
        f"A backdoor should make the model answer `{KINDS[0]}` to every picture with a trigger. You forget to leave the scenes that really show a {KINDS[0]} out of the attack success rate. What does a perfect model without any backdoor score?",
        right=Choice(percent(target_share), f"Exactly the share of test scenes that show a {KINDS[0]}. The model is right on them, and you would call that a success."),
        wrong=[
            Choice(percent(0.0), "So it should be, and so it is once the scenes of the target class are left out."),
            Choice(percent(0.5), "That would be chance between two classes. There are more here, and the model does not guess."),
            Choice(percent(1.0), "The model answers with the target only where the target is to be seen."),
        ],
    ),
    Question(
        "Detector A catches 95 % of the attacks and flags 20 % of clean pictures. Detector B catches 80 % and flags 1 %. Which one is better?",
        right=Choice("You cannot tell yet.", "Move both thresholds, on held-out clean pictures, until they flag the same share, say 5 %. Then compare what they catch, and at last attack each of them adaptively."),
        wrong=[
            Choice("A: it catches more.", "So does a detector that flags everything. What it catches counts only at a fixed false-positive rate."),
            Choice("B: it hardly disturbs anybody.", "A detector that flags nothing disturbs nobody. At the same false-positive rate as A it may catch more, or less."),
        ],
    ),
    Question(
        "A change to a picture ruins SAM's mask for the point it was made for. You click two pixels further and the mask is back. What was missing?",
        right=Choice("The attack was made for one prompt; it should be made for, and judged on, many.", "People click where they like. A prompt-agnostic attack spoils what the image encoder hands to every prompt, and is measured on prompts it has not seen."),
        wrong=[
            Choice("A larger eps.", "Perhaps that hides the problem at this point. The objective still knows one prompt only."),
            Choice("Nothing: the attack succeeded on the prompt it was made for.", "It did, for an attacker who knows the click in advance. State that in the threat model, because most attackers do not."),
        ],
    ),
]  # fmt: skip
course.quiz("chapter-2", *questions, title=f"Chapter 2: {len(questions)} questions")

# %% [markdown]
# If one of the answers surprised you, the section it belongs to is the one to read again.

# %% tags=["remove-cell"]
from myst_nb import glue

glue("vit_clean", round(100 * clean.value, 1), display=False)
glue("vit_pgd", round(100 * pgd_acc.value, 1), display=False)
glue("robust_adaptive", round(100 * adaptive.value, 1), display=False)
glue("scenes_n", len(test), display=False)
