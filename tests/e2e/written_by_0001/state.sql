BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE batches (
	serial INTEGER NOT NULL, 
	id TEXT NOT NULL, 
	tenant TEXT NOT NULL, 
	dialect TEXT NOT NULL, 
	endpoint TEXT, 
	input_file_id TEXT, 
	source TEXT NOT NULL, 
	completion_window TEXT, 
	deadline_at BIGINT, 
	on_invalid VARCHAR(16) NOT NULL, 
	on_unknown VARCHAR(16) NOT NULL, 
	"order" VARCHAR(16) NOT NULL, 
	priority INTEGER NOT NULL, 
	hold_at BIGINT, 
	metadata TEXT NOT NULL, 
	parent_id TEXT, 
	chosen_blob TEXT, 
	status VARCHAR(16) NOT NULL, 
	version BIGINT NOT NULL, 
	ended_by VARCHAR(16), 
	is_open BOOLEAN NOT NULL, 
	paused_reason TEXT, 
	paused_at BIGINT, 
	blocked_by TEXT, 
	total_count BIGINT DEFAULT 0 NOT NULL, 
	succeeded_count BIGINT DEFAULT 0 NOT NULL, 
	failed_count BIGINT DEFAULT 0 NOT NULL, 
	refused_count BIGINT DEFAULT 0 NOT NULL, 
	expired_count BIGINT DEFAULT 0 NOT NULL, 
	cancelled_count BIGINT DEFAULT 0 NOT NULL, 
	re_executed_count BIGINT DEFAULT 0 NOT NULL, 
	retry_count BIGINT DEFAULT 0 NOT NULL, 
	input_tokens BIGINT DEFAULT 0 NOT NULL, 
	cached_tokens BIGINT DEFAULT 0 NOT NULL, 
	output_tokens BIGINT DEFAULT 0 NOT NULL, 
	reasoning_tokens BIGINT DEFAULT 0 NOT NULL, 
	next_sequence BIGINT DEFAULT 1 NOT NULL, 
	open_shards BIGINT DEFAULT 0 NOT NULL, 
	model TEXT, 
	problems_blob TEXT, 
	problem_count BIGINT DEFAULT 0 NOT NULL, 
	problems TEXT NOT NULL, 
	input_sha256 TEXT, 
	output_file_id TEXT, 
	error_file_id TEXT, 
	created_at BIGINT NOT NULL, 
	in_progress_at BIGINT, 
	finalizing_at BIGINT, 
	cancelling_at BIGINT, 
	completed_at BIGINT, 
	failed_at BIGINT, 
	expired_at BIGINT, 
	cancelled_at BIGINT, 
	PRIMARY KEY (serial), 
	CONSTRAINT batch_open_shards CHECK (open_shards >= 0), 
	UNIQUE (id), 
	FOREIGN KEY(input_file_id) REFERENCES files (id), 
	CONSTRAINT batch_on_invalid CHECK (on_invalid IN ('fail', 'skip')), 
	CONSTRAINT batch_on_unknown CHECK (on_unknown IN ('retry', 'fail')), 
	CONSTRAINT batch_order CHECK ("order" IN ('input', 'completion')), 
	FOREIGN KEY(parent_id) REFERENCES batches (id), 
	CONSTRAINT batch_status CHECK (status IN ('validating', 'in_progress', 'finalizing', 'cancelling', 'completed', 'failed', 'expired', 'cancelled')), 
	CONSTRAINT batch_ended_by CHECK (ended_by IN ('settled', 'deadline', 'cancel')), 
	FOREIGN KEY(output_file_id) REFERENCES files (id), 
	FOREIGN KEY(error_file_id) REFERENCES files (id)
);
INSERT INTO "batches" VALUES(1,'batch_08f407786d1b93dddb08ba9ae4d12633','local','run',NULL,NULL,'input',NULL,NULL,'fail','retry','input',0,NULL,'{}',NULL,NULL,'in_progress',2,NULL,0,NULL,NULL,NULL,60,40,0,0,0,0,0,0,720,160,1522,263,41,1,'m',NULL,0,'[]','e384c64afe988d814e4164de3d667180e9e51fc38895a5d8b8da75119ac949f9',NULL,NULL,1795273131980013,1795273132047875,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE claims (
	task_id INTEGER NOT NULL, 
	epoch BIGINT NOT NULL, 
	session TEXT NOT NULL, 
	PRIMARY KEY (task_id, epoch), 
	FOREIGN KEY(task_id) REFERENCES tasks (id)
);
INSERT INTO "claims" VALUES(1,1,'a93f718dabf5f09f');
INSERT INTO "claims" VALUES(2,1,'a93f718dabf5f09f');
INSERT INTO "claims" VALUES(3,1,'a93f718dabf5f09f');
INSERT INTO "claims" VALUES(4,1,'a93f718dabf5f09f');
CREATE TABLE extents (
	batch_id TEXT NOT NULL, 
	sequence_from BIGINT NOT NULL, 
	task_id INTEGER NOT NULL, 
	count BIGINT NOT NULL, 
	epoch BIGINT NOT NULL, 
	session TEXT NOT NULL, 
	segment BIGINT NOT NULL, 
	byte_start BIGINT NOT NULL, 
	byte_end BIGINT NOT NULL, 
	succeeded_count BIGINT DEFAULT 0 NOT NULL, 
	failed_count BIGINT DEFAULT 0 NOT NULL, 
	input_tokens BIGINT DEFAULT 0 NOT NULL, 
	cached_tokens BIGINT DEFAULT 0 NOT NULL, 
	output_tokens BIGINT DEFAULT 0 NOT NULL, 
	reasoning_tokens BIGINT DEFAULT 0 NOT NULL, 
	PRIMARY KEY (batch_id, sequence_from), 
	CONSTRAINT extent_count CHECK (count = succeeded_count + failed_count AND count > 0 AND byte_end > byte_start), 
	FOREIGN KEY(batch_id) REFERENCES batches (id), 
	FOREIGN KEY(task_id) REFERENCES tasks (id)
);
INSERT INTO "extents" VALUES('batch_08f407786d1b93dddb08ba9ae4d12633',1,2,20,1,'a93f718dabf5f09f',1,0,15790,20,0,360,80,811,156);
INSERT INTO "extents" VALUES('batch_08f407786d1b93dddb08ba9ae4d12633',21,3,20,1,'a93f718dabf5f09f',1,0,15803,20,0,360,80,711,107);
CREATE TABLE files (
	id TEXT NOT NULL, 
	tenant TEXT NOT NULL, 
	purpose TEXT NOT NULL, 
	filename TEXT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	sha256 TEXT NOT NULL, 
	blob TEXT NOT NULL, 
	created_at BIGINT NOT NULL, 
	expires_at BIGINT, 
	PRIMARY KEY (id)
);
CREATE TABLE outbox (
	id TEXT NOT NULL, 
	batch_id TEXT NOT NULL, 
	event TEXT NOT NULL, 
	body TEXT NOT NULL, 
	created_at BIGINT NOT NULL, 
	state TEXT DEFAULT 'pending' NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(batch_id) REFERENCES batches (id)
);
CREATE TABLE sessions (
	id TEXT NOT NULL, 
	host TEXT NOT NULL, 
	boot_id TEXT NOT NULL, 
	pid BIGINT NOT NULL, 
	opened_at BIGINT NOT NULL, 
	is_hungry BOOLEAN NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "sessions" VALUES('a93f718dabf5f09f','vm','00000000-0000-4000-8000-000000000001',21449,1795273131991882,0);
CREATE TABLE tasks (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	batch_id TEXT NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	epoch BIGINT NOT NULL, 
	session TEXT, 
	taken_from TEXT, 
	lease_until FLOAT, 
	boot_id TEXT, 
	attempts BIGINT DEFAULT 0 NOT NULL, 
	not_before FLOAT, 
	last_error TEXT, 
	orphaned_by_death BOOLEAN NOT NULL, 
	deaths BIGINT DEFAULT 0 NOT NULL, 
	is_quarantined BOOLEAN NOT NULL, 
	fence_epoch BIGINT, 
	byte_start BIGINT, 
	byte_end BIGINT, 
	first_line BIGINT, 
	first_index BIGINT, 
	line_count BIGINT, 
	checksum BIGINT, 
	skipped TEXT, 
	intent_mark BIGINT DEFAULT 0 NOT NULL, 
	whole_epoch BIGINT DEFAULT 0 NOT NULL, 
	succeeded_count BIGINT DEFAULT 0 NOT NULL, 
	failed_count BIGINT DEFAULT 0 NOT NULL, 
	input_tokens BIGINT DEFAULT 0 NOT NULL, 
	cached_tokens BIGINT DEFAULT 0 NOT NULL, 
	output_tokens BIGINT DEFAULT 0 NOT NULL, 
	reasoning_tokens BIGINT DEFAULT 0 NOT NULL, 
	FOREIGN KEY(batch_id) REFERENCES batches (id), 
	CONSTRAINT task_kind CHECK (kind IN ('validate', 'shard', 'seal', 'notify')), 
	CONSTRAINT task_state CHECK (state IN ('queued', 'leased', 'settled', 'sealed', 'final', 'parked'))
);
INSERT INTO "tasks" VALUES(1,'batch_08f407786d1b93dddb08ba9ae4d12633','validate','settled',1,NULL,NULL,NULL,'00000000-0000-4000-8000-000000000001',0,NULL,NULL,0,0,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,0,0,0,0,0);
INSERT INTO "tasks" VALUES(2,'batch_08f407786d1b93dddb08ba9ae4d12633','shard','settled',1,NULL,NULL,NULL,'00000000-0000-4000-8000-000000000001',0,NULL,NULL,0,0,0,NULL,0,3022,1,0,20,1402363850,'[]',0,0,20,0,360,80,811,156);
INSERT INTO "tasks" VALUES(3,'batch_08f407786d1b93dddb08ba9ae4d12633','shard','settled',1,NULL,NULL,NULL,'00000000-0000-4000-8000-000000000001',0,NULL,NULL,0,0,0,NULL,3022,6062,21,20,20,3077441767,'[]',0,0,20,0,360,80,711,107);
INSERT INTO "tasks" VALUES(4,'batch_08f407786d1b93dddb08ba9ae4d12633','shard','leased',1,'a93f718dabf5f09f',NULL,18960.280491242,'00000000-0000-4000-8000-000000000001',0,NULL,NULL,0,0,0,NULL,6062,9102,41,40,20,4064238866,'[]',0,0,0,0,0,0,0,0);
CREATE INDEX batches_by_tenant ON batches (tenant, serial);
CREATE INDEX batches_by_status ON batches (status, deadline_at);
CREATE INDEX tasks_by_session ON tasks (session);
CREATE UNIQUE INDEX one_seal_per_batch ON tasks (batch_id) WHERE kind = 'seal';
CREATE INDEX tasks_by_batch ON tasks (batch_id, kind, first_line);
CREATE INDEX tasks_to_claim ON tasks (kind, state, batch_id, is_quarantined, first_index);
CREATE INDEX tasks_by_loser ON tasks (taken_from);
CREATE INDEX outbox_by_state ON outbox (state, created_at);
CREATE INDEX extents_by_task ON extents (task_id, epoch, segment);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('tasks',4);
COMMIT;
