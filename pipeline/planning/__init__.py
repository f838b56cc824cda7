"""What a run will take, said before it is begun: a rehearsal of its stages at small size, and what follows from it for the whole."""
