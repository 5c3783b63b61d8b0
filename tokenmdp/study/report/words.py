"""Prose of a study's page: the terms that it uses."""

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
