"""The invented world of mini M-BEIR: what there is, how it is said and drawn, what is asked."""
