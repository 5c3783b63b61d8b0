"""Prose of a study's page: terms that it uses and what a reader must know about the bundled models."""

ABOUT = {  # a bundled model -> what its results depend on
    "imdb-tiny": "The reward model imdb-tiny was trained, after its scores, to attend to the tokens that the score "
    "hangs on (leave-one-out). imdb-plain is the same model before that.",
}
WORDS = """<details><summary>words</summary><ul>
<li>score: of the reward model, for a whole response; the mean score is over the 16 or so episodes of an update</li>
<li>KL: of the policy to the model that training started from, in nats, summed over the tokens of a response</li>
<li>credit_beta: the share of the score that is spread over the tokens; the rest stays on the last one</li>
<li>leave-one-out: the score of a text minus its score without a token, which is what the token was worth</li>
<li>gold, second reward model: another one that judges the texts and trains no policy</li>
<li>IQM: interquartile mean, of the middle half of the seeds</li>
<li>distinct-2: the share of token pairs that differ, over all texts; self-BLEU: BLEU of each text against the
others, so 1 is one text again and again</li>
</ul></details>"""
