"""What the help and the man pages say besides the options: exit codes, signals, files, variables."""

from __future__ import annotations

EXIT_CODES = {
    "0": "Success. Of a mount: the root answers.",
    "1": "Failure: one line on standard error for each thing that could not be done.",
    "2": "Usage: an option, an argument or a setting makes no sense. Of mount.desfs: 1, as mount(8) has it.",
    "3": "desfs verify found damage.",
    "32": "The mount failed; one line on standard error says why.",
}

SIGNALS = {
    "SIGTERM, SIGINT": "A mount unmounts, lazily when it is busy, and ends within ten seconds; who still reads gets "
    "errors. A packer ends after the batch at hand; the second signal ends it at once. The assignment service answers "
    "the requests at hand, and gives its node id back.",
    "SIGHUP": "A mount reads its settings again, opens log_file anew, and lists the days again that somebody has "
    "looked at. refresh, deadline, log_level, log_format and log_file take effect at once, the others with the next "
    "mount.",
    "SIGUSR1": "A mount writes its state to the log: open requests with their age, tasks and what they wait in, "
    "caches.",
}

FILES = {
    "DIR/.desfs/": "In a mount, reachable by name and listed nowhere: stats, containers, problems, config. "
    "Reading them asks the store for nothing.",
    "SPOOL/.desfs/": "In a spool: what the packer has claimed, its journals, its catalog, and what it has put aside "
    "(rejected/, each with its reason).",
    "STORE/.desfs.json": "How the files of a store are placed and named; written by its first packer.",
    "/etc/fuse.conf": "The line user_allow_other lets ordinary users mount with allow_other.",
}

ENVIRONMENT = {
    "DESFS_NAME": "Each setting, in capitals: DESFS_REFRESH for refresh. The command line wins over it, it wins over a "
    "settings file.",
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL, …": "How to reach S3, as every AWS tool "
    "has it. Credentials are never options.",
    "NOTIFY_SOCKET, WATCHDOG_USEC": "Set by systemd: a mount in the foreground (-f) says when it is ready, reloads, "
    "stops, and that its event loop turns: see sd_notify(3).",
}

ESCAPES = (
    r"Options are separated by commas. A backslash takes the next character as it is: a comma in a value is written \,"
    r" and a backslash \\. In fstab(5) a space is \040 and a backslash \134."
)
