"""memwatch in other people's loops: ``integrations.transformers``, ``integrations.lightning``, ``integrations.tracker``. Import the one you use."""
