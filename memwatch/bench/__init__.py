"""The planted-memorization benchmark: fine-tunes with exact masks and known doses, all signals and rivals compared.

``photographs`` are the pixels, ``items`` what is planted, ``train`` one seeded and resumable run. ``protocol`` says
what is measured at an event, ``look`` measures it, ``copies`` tells what was copied, and ``runs`` reads it all back.
``methods`` and ``rivals`` make maps and scores, ``results`` judges them, ``rows`` and ``tables`` compare them, ``page``
and ``plots`` write it down. ``events`` times whole events, for ``memwatch cost`` as well; ``cost`` puts memwatch beside
the ``procedure`` as published, against ``exact`` diagonals, and ``cost_page`` writes that down. ``memwatch bench`` runs
it; ``metrics`` and ``evaluation`` are ``memwatch eval`` as well.
"""
