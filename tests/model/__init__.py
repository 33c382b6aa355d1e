"""Exhaustive searches of the core: journal, lease and seal as small models, every interleaving visited.

`search.py` is the explorer. `extents.py` models what happens to lines, `extents_invariants.py` says what must stay
true of them, `seal.py` models who ends a batch. A model has `Bounds` (how far to search) and `Rules` (all on). A
mutant is a model with one rule off, and its test names the invariant that breaks: a rule that can go without harm
has no business in the code, an invariant that no mutant breaks tests nothing. Both lists are checked to be complete.

How to read a model: a state is everything that lasts (the Store's rows, the bytes in the segments) and everything that
processes have in memory. A step is one thing that one process does and others can notice; a Store transaction is one
step. A process that crashes is one that takes no further step, a process that is paused for an hour is one whose next
step comes late, so every crash and every delay is among the interleavings. A write that the Store refuses changes
nothing and is no step.

Lines (`extents.py`), step by step:

"claims"
    rule: a claim raises the shard's epoch, which freezes what older epochs have registered (`claim_bumps_epoch`).
    A lease may run out at any moment, so here an open shard may always be claimed again.
"recovers, salvages"
    rule: before its first send a claimer looks through the older segments of its shard for records that are whole but
    not registered (`claim_salvages`); it takes successes only, for an error may be the timeout of a session that was
    frozen (`salvage_takes_only_successes`), and only lines that the shard still has (`salvage_stays_in_the_shard`).
    Everything else is sent again.
"appends" of a salvaged record
    rule: salvage is copied into the claimer's own segment, synced and registered there; unregistered bytes of another
    session are never trusted where they lie (`salvage_copies`).
"finishes writing", "writes to its next segment"
    rule: a record may be on disk in part, and then it does not exist, whoever looks (`torn_is_no_record`); after a
    short write the whole group goes to a new segment.
"syncs", "registers lines"
    rule: a record exists once its extent is registered: after its sync has returned (`register_after_sync`), in a
    transaction guarded by the shard's epoch (`registration_guarded`), which also draws the sequence numbers
    (`sequence_drawn_in_transaction`).
"settles"
    rule: only the holder of the current epoch settles, with every line registered; the last shard moves the batch.
"cuts off the lines"
    rule: the holder may cut the suffix that it has not handed out (`split_takes_only_untouched`) off as a new open
    shard, in one transaction guarded by the epoch (`split_guarded`).
"deadline passes", "cancel", "cancel while finalizing"
    rule: the first move out of in_progress decides the code of unfinished lines, a later cancel changes the final word
    only (`codes_follow_first_move`).
"seal claims and fences"
    rule: before it reads anything the seal raises the epoch of every shard, so that nobody else can register any more
    (`seal_fences`). Two seals may be alive; the Store accepts the newer.
"seal sees", "registers its salvage", "finds all final"
    rule: a batch is salvaged for its seal once; then its shards are final, and a later seal only reads
    (`salvage_ends_with_final`).
"seal reads", "publishes"
    rule: the content is a function of input, extents and the cause of the end; publishing picks its move from the
    status that it finds in its own transaction (`publish_checks_status`).
"power loss"
    rule: of what was not synced each record may be there or not; nothing registered may change.
"is damaged", "heals"
    Registered bytes read wrong, for good or for a while: a bad disk, a folder that was not mounted.
"takes out"
    rule: who finds registered bytes damaged takes them out of the extents, in a transaction guarded by its epoch
    (`repair_guarded`), before or together with anything new that it registers. From then on nobody takes these bytes,
    whatever they read like (`repair_takes_damage_out`); their lines run again, their numbers are not given again.
"seal takes out", "sends the batch back"
    rule: a seal that meets damage never publishes around it (`seal_repairs`). Where every line had been settled, the
    shards that now lack one are open again and the batch is in progress, without a cause of its end
    (`sending_back_undoes_the_end`); where the end came early the line is one of the unfinished.
no step: the outside reader
    rule: nobody takes a byte outside an extent (`reader_stays_within_extents`). A reader that looks after every single
    step sees whatever a slower one could see, so what it sees is compared over every step.

Ends (`seal.py`):

- rule: the transaction that moves a batch to finalizing or cancelling inserts its one seal task, whoever does it
  (`mover_inserts_seal`, `seal_task_is_unique`).
- rule: settling decrements a counter on the batch row, under its lock; counting the other shards by reading misses what
  has not committed (`settle_counts_on_batch_row`). A split counts the new shard (`split_counts_the_new_shard`).
- rule: settling is allowed in any status and moves the batch only from in_progress (`settle_allowed_in_any_status`).
- rule: the seal waits for live holders or their grace, never for queued shards that nobody may claim any more
  (`seal_needs_no_settled_shards`).
- rule: the cause of the end is set once (`cause_is_set_once`); publishing looks at the status that it finds
  (`publish_checks_status`).

There death is a step, and the question is liveness: from every state an end can be reached, also where there is
neither deadline nor cancel.

Left out: lease times (a lease that may end at any time is more than clocks allow), the bytes of a frame, the frozen
segments of an object store, and batches that still get lines. A success that a frozen session writes for a line that
its successor has cut off is paid for and not found by salvage, since each shard looks through its own segments: it
counts towards the promised bound on repeats.
"""
