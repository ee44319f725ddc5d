"""What is minimised; one paper, one file, each a pure function from scores of tokens to terms of the loss.

logprobs.py  the shared forward pass: log-probabilities of targets, for every objective
sft.py       supervised fine-tuning: likelihood of completions
double_rounding.py  the same at the width of this update, with or without a teacher
agreement.py  how near a drafter's distribution comes to its target's
eagle.py     a drafter guesses the target's next feature; also what every objective of that kind shares
jakiro.py    the same with two experts, one of them two tokens ahead
kangaroo.py  an adapter on the first layers guesses the target's next token
specdec_pp.py  a head on the drafter's states: will this draft be accepted?
labelled.py  what labelled tokens teach: shared by judges and reward models
prm.py       a reward model learns which steps are right
ivo.py       a value model learns what a text is worth from any of its tokens
by_name.py   the names of `train preference`: papers, rows, and from what models say to terms
sequences.py  from tokens to sums over the sequences of examples
preference.py  what preference losses share: sums, log-ratios, what is logged of a pair
dpo.py       preferences in pairs: DPO and the losses on the same two log-ratios
kto.py       answers good or bad by themselves, against a running estimate of the KL
bco.py       the same as a classifier, with a shift that is carried along
orpo.py      odds of the chosen answer, beside its likelihood; no reference
simpo.py     averages and a margin, no reference; AlphaPO's reward shape
cpo.py       DPO under a uniform reference, beside the likelihood
d2o.py       bad answers alone, held by samples of the initial model
sparsepo.py  DPO of tokens, under masks that say which count
gdpo_belief.py  beliefs as people hold them, and DPO behind each
mm_dpo.py    DPO whose beta grows with the gap of ratings
npo.py       unlearning: NPO and gradient ascent
unlearn.py   what is forgotten beside what is retained
dft.py       fine-tuning weighted by how likely a token is
asft.py      the same, anchored to the base model
fsft.py      fine-tuning as an implied reward under f-divergences
kl_estimators.py  how far the policy is from the reference: k1, k2, k3, and what each is as a loss
policy_gradient.py  sampled answers and their advantages: PPO, GRPO, DAPO, GSPO, CISPO; four ways to add tokens up
ppo.py       the value model of PPO
classify.py  labels of images, and what a teacher says
judge.py     a head on the target's states: is this token good, from labels
"""
