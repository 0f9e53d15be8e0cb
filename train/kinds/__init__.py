"""How each kind of drafter learns: one file per kind, all of them Trainables."""
