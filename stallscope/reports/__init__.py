"""A ``Diagnosis`` as people and programs read it: ``text`` for terminals, ``json`` for machines."""
