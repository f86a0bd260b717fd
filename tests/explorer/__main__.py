"""`python -m explorer`, as scripts/crash-explore runs it."""

from .processes import main

raise SystemExit(main())
