"""The planted-memorization benchmark: fine-tunes with exact masks and known doses, every signal and every rival on the same checkpoints.

``photographs`` are the pixels, ``items`` what is planted, ``train`` one seeded and resumable run, ``look`` what is measured at an event,
``methods`` every way to turn that into maps and scores, ``table`` the comparison, ``report`` the page. ``memwatch bench`` runs it all.
"""
