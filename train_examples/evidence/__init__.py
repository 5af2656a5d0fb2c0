"""The benchmark: fine-tunes of which it is known what is planted, how often it is shown, and what is copied.

What runs train on: ``sources`` and ``photographs`` have the pictures, ``shapes`` the masks, ``items`` and ``sets`` what
is planted, ``bases`` the models, ``worlds`` the kinds of run. ``train`` makes one run by its ``trainer``; ``protocol``
says what is measured at an event, ``look`` measures it, ``copies`` what is generated, and ``runs`` reads it all back.

What is made of them: ``product`` is memwatch itself, ``stored`` what is copied and when, ``descriptor`` has other
rules for that, ``by_rule`` asks them in its place, and ``agreement`` says where they part. ``verdicts``, ``stops``,
``alternatives`` and ``bars`` judge memwatch, ``rivals``, ``contest`` and ``prompted`` compare it, ``intervals`` say how
sure that is. ``page``, ``gallery`` and ``summary`` write it down.

``events`` times whole events, for ``memwatch cost`` as well; ``cost`` puts memwatch beside the ``procedure`` as
published, against ``exact`` diagonals. ``picking``, ``forecasts`` and ``promise`` have pages of their own.
``memwatch bench`` runs it; ``metrics`` and ``evaluation`` are ``memwatch eval`` as well.
"""
