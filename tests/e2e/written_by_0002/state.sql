PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
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
	deleted_at BIGINT, 
	freed_at BIGINT, 
	line_count BIGINT, 
	validation_blob TEXT, 
	PRIMARY KEY (id)
);
INSERT INTO files VALUES('file-5fb20289a3fcc5eb84de122f','local','batch','in.jsonl',167,'99e12efb915600511c37e4e987ed88cbb483ddd06c0c2dd46f9a8d3c8c2df8da','files/6e0fb137da4b0b829eb3127b40dcf43a',1795291130430560,4102444800000000,NULL,NULL,1,NULL);
INSERT INTO files VALUES('file-364558aab9b63f5bab04e158','local','batch_output','batch_822ca50d34ccdd0e4633e6a1441796b2_output.jsonl',762,'2f1772355864e8af6b287d7ca2361b1d190b45ea7a7de305819ef72bc70c2d06','files/batch_822ca50d34ccdd0e4633e6a1441796b2/1-76dffce8a3651e64-output.jsonl',1795291134355080,4102444800000000,NULL,NULL,NULL,NULL);
INSERT INTO files VALUES('file-c9d664adfff7f94e779005b5','local','batch','in.jsonl',10070,'ee9240f2f599e3a0cf673e7f9a85523db388fba7c26c91718a7570b10f840557','files/8ea996645c8e9e87bb4d9622dc4240f3',1795291134457249,4102444800000000,NULL,NULL,60,NULL);
CREATE TABLE sessions (
	id TEXT NOT NULL, 
	host TEXT NOT NULL, 
	boot_id TEXT NOT NULL, 
	pid BIGINT NOT NULL, 
	opened_at BIGINT NOT NULL, 
	is_hungry BOOLEAN NOT NULL, 
	live TEXT, 
	live_at FLOAT, 
	PRIMARY KEY (id)
);
INSERT INTO sessions VALUES('76dffce8a3651e64','vm','3fd23a2e-9864-4b88-9809-9f9301441b62',2256,1795291133237434,0,'[{"batch_id":"batch_d6e8f98a966625f1253ed00caab962c5","in_flight":4,"waiting":0,"done_per_s":8.774146492849402,"window":4,"bound_by":"pinned"}]',36950.942908247001469);
CREATE TABLE keys (
	id TEXT NOT NULL, 
	tenant TEXT NOT NULL, 
	name TEXT NOT NULL, 
	digest TEXT NOT NULL, 
	shown TEXT NOT NULL, 
	scopes TEXT NOT NULL, 
	limits TEXT NOT NULL, 
	created_at BIGINT NOT NULL, 
	expires_at BIGINT, 
	revoked_at BIGINT, 
	PRIMARY KEY (id), 
	UNIQUE (digest)
);
CREATE TABLE idempotency (
	tenant TEXT NOT NULL, 
	route TEXT NOT NULL, 
	"key" TEXT NOT NULL, 
	fingerprint TEXT, 
	state VARCHAR(16) NOT NULL, 
	status INTEGER, 
	body BLOB, 
	object_id TEXT, 
	created_at BIGINT NOT NULL, 
	lease_until FLOAT, 
	boot_id TEXT NOT NULL, 
	PRIMARY KEY (tenant, route, "key"), 
	CONSTRAINT idempotency_state CHECK (state IN ('running', 'done'))
);
CREATE TABLE blobs (
	name TEXT NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	created_at BIGINT NOT NULL, 
	owner TEXT NOT NULL, 
	PRIMARY KEY (name), 
	CONSTRAINT blob_state CHECK (state IN ('pending', 'live', 'dead'))
);
INSERT INTO blobs VALUES('files/6e0fb137da4b0b829eb3127b40dcf43a','live',1795291130261831,'api');
INSERT INTO blobs VALUES('files/batch_822ca50d34ccdd0e4633e6a1441796b2/1-76dffce8a3651e64-output.jsonl','live',1795291134343954,'76dffce8a3651e64');
INSERT INTO blobs VALUES('files/8ea996645c8e9e87bb4d9622dc4240f3','live',1795291134447281,'api');
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
	input_name TEXT, 
	output_expires_after_s BIGINT, 
	webhook_url TEXT, 
	deleted_at BIGINT, 
	probed_at BIGINT, 
	journal_ended_at BIGINT, 
	journal_freed_at BIGINT, 
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
INSERT INTO batches VALUES(1,'batch_822ca50d34ccdd0e4633e6a1441796b2','local','openai','/v1/chat/completions','file-5fb20289a3fcc5eb84de122f','files/6e0fb137da4b0b829eb3127b40dcf43a','14d',4102444800000000,'fail','retry','input',0,NULL,'{}',NULL,NULL,'completed',4,'settled',0,NULL,NULL,NULL,1,1,0,0,0,0,0,0,20,5,47,13,2,0,'simulated',NULL,0,'[]','99e12efb915600511c37e4e987ed88cbb483ddd06c0c2dd46f9a8d3c8c2df8da','file-364558aab9b63f5bab04e158',NULL,1795291130460785,1795291133500667,1795291133963805,NULL,1795291134359219,NULL,NULL,NULL,'file-5fb20289a3fcc5eb84de122f',2592000,NULL,NULL,NULL,NULL,NULL);
INSERT INTO batches VALUES(2,'batch_d6e8f98a966625f1253ed00caab962c5','local','openai','/v1/chat/completions','file-c9d664adfff7f94e779005b5','files/8ea996645c8e9e87bb4d9622dc4240f3','14d',4102444800000000,'fail','retry','input',0,NULL,'{}',NULL,NULL,'in_progress',2,NULL,0,NULL,NULL,NULL,60,28,0,0,0,0,0,0,560,140,1073,206,29,2,'simulated',NULL,0,'[]','ee9240f2f599e3a0cf673e7f9a85523db388fba7c26c91718a7570b10f840557',NULL,NULL,1795291134461221,1795291134559792,NULL,NULL,NULL,NULL,NULL,NULL,'file-c9d664adfff7f94e779005b5',2592000,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE uploads (
	id TEXT NOT NULL, 
	tenant TEXT NOT NULL, 
	filename TEXT NOT NULL, 
	purpose TEXT NOT NULL, 
	mime_type TEXT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	created_at BIGINT NOT NULL, 
	expires_at BIGINT NOT NULL, 
	expires_after_s BIGINT, 
	file_id TEXT, 
	PRIMARY KEY (id), 
	CONSTRAINT upload_status CHECK (status IN ('pending', 'completed', 'cancelled', 'expired')), 
	FOREIGN KEY(file_id) REFERENCES files (id)
);
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
INSERT INTO tasks VALUES(1,'batch_822ca50d34ccdd0e4633e6a1441796b2','validate','settled',1,NULL,NULL,NULL,'3fd23a2e-9864-4b88-9809-9f9301441b62',0,NULL,NULL,0,0,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,0,0,0,0,0);
INSERT INTO tasks VALUES(2,'batch_822ca50d34ccdd0e4633e6a1441796b2','shard','final',2,NULL,NULL,NULL,'3fd23a2e-9864-4b88-9809-9f9301441b62',0,NULL,NULL,0,0,0,1,0,167,1,0,1,3067695783,'[]',0,0,1,0,20,5,47,13);
INSERT INTO tasks VALUES(3,'batch_822ca50d34ccdd0e4633e6a1441796b2','seal','settled',1,NULL,NULL,NULL,'3fd23a2e-9864-4b88-9809-9f9301441b62',0,NULL,NULL,0,0,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,0,0,0,0,0);
INSERT INTO tasks VALUES(4,'batch_d6e8f98a966625f1253ed00caab962c5','validate','settled',1,NULL,NULL,NULL,'3fd23a2e-9864-4b88-9809-9f9301441b62',0,NULL,NULL,0,0,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,0,0,0,0,0);
INSERT INTO tasks VALUES(5,'batch_d6e8f98a966625f1253ed00caab962c5','shard','settled',1,NULL,NULL,NULL,'3fd23a2e-9864-4b88-9809-9f9301441b62',0,NULL,NULL,0,0,0,NULL,0,3350,1,0,20,765017967,'[]',0,0,20,0,400,100,771,157);
INSERT INTO tasks VALUES(6,'batch_d6e8f98a966625f1253ed00caab962c5','shard','leased',1,'76dffce8a3651e64',NULL,36962.758227393998822,'3fd23a2e-9864-4b88-9809-9f9301441b62',0,NULL,NULL,0,0,0,NULL,3350,6710,21,20,20,1224261401,'[]',0,0,8,0,160,40,302,49);
INSERT INTO tasks VALUES(7,'batch_d6e8f98a966625f1253ed00caab962c5','shard','leased',1,'76dffce8a3651e64',NULL,36964.682965786996647,'3fd23a2e-9864-4b88-9809-9f9301441b62',0,NULL,NULL,0,0,0,NULL,6710,10070,41,40,20,2388281685,'[]',0,0,0,0,0,0,0,0);
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
INSERT INTO outbox VALUES('evt_787041b3ec3792c10366bf0bf06487fa','batch_822ca50d34ccdd0e4633e6a1441796b2','batch.completed','{"id":"evt_787041b3ec3792c10366bf0bf06487fa","object":"event","type":"batch.completed","created_at":1795291134,"data":{"id":"batch_822ca50d34ccdd0e4633e6a1441796b2"}}',1795291134359219,'pending');
CREATE TABLE upload_parts (
	serial INTEGER NOT NULL, 
	id TEXT NOT NULL, 
	upload_id TEXT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	blob TEXT NOT NULL, 
	created_at BIGINT NOT NULL, 
	PRIMARY KEY (serial), 
	UNIQUE (id), 
	FOREIGN KEY(upload_id) REFERENCES uploads (id)
);
CREATE TABLE claims (
	task_id INTEGER NOT NULL, 
	epoch BIGINT NOT NULL, 
	session TEXT NOT NULL, 
	PRIMARY KEY (task_id, epoch), 
	FOREIGN KEY(task_id) REFERENCES tasks (id)
);
INSERT INTO claims VALUES(1,1,'76dffce8a3651e64');
INSERT INTO claims VALUES(2,1,'76dffce8a3651e64');
INSERT INTO claims VALUES(3,1,'76dffce8a3651e64');
INSERT INTO claims VALUES(2,2,'76dffce8a3651e64');
INSERT INTO claims VALUES(4,1,'76dffce8a3651e64');
INSERT INTO claims VALUES(5,1,'76dffce8a3651e64');
INSERT INTO claims VALUES(6,1,'76dffce8a3651e64');
INSERT INTO claims VALUES(7,1,'76dffce8a3651e64');
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
INSERT INTO extents VALUES('batch_822ca50d34ccdd0e4633e6a1441796b2',1,2,1,1,'76dffce8a3651e64',1,0,842,1,0,20,5,47,13);
INSERT INTO extents VALUES('batch_d6e8f98a966625f1253ed00caab962c5',1,5,20,1,'76dffce8a3651e64',1,0,16118,20,0,400,100,771,157);
INSERT INTO extents VALUES('batch_d6e8f98a966625f1253ed00caab962c5',21,6,8,1,'76dffce8a3651e64',1,0,6459,8,0,160,40,302,49);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO alembic_version VALUES('0002');
DELETE FROM sqlite_sequence;
INSERT INTO sqlite_sequence VALUES('tasks',7);
CREATE INDEX files_by_tenant ON files (tenant, created_at, id);
CREATE INDEX files_by_blob ON files (blob);
CREATE INDEX files_to_free ON files (deleted_at, expires_at) WHERE freed_at IS NULL;
CREATE INDEX idempotency_by_age ON idempotency (created_at);
CREATE INDEX blobs_by_state ON blobs (state, created_at);
CREATE INDEX batches_by_status ON batches (status, deadline_at);
CREATE INDEX batches_by_output ON batches (output_file_id);
CREATE INDEX batches_by_tenant ON batches (tenant, serial);
CREATE INDEX batches_by_parent ON batches (parent_id);
CREATE INDEX batches_with_journals ON batches (journal_ended_at, status) WHERE journal_freed_at IS NULL;
CREATE INDEX batches_by_tenant_and_status ON batches (tenant, status);
CREATE INDEX uploads_by_status ON uploads (status, expires_at);
CREATE INDEX tasks_by_batch ON tasks (batch_id, kind, first_line);
CREATE UNIQUE INDEX one_seal_per_batch ON tasks (batch_id) WHERE kind = 'seal';
CREATE INDEX tasks_to_claim ON tasks (kind, state, batch_id, is_quarantined, first_index);
CREATE INDEX tasks_by_loser ON tasks (taken_from);
CREATE INDEX tasks_by_session ON tasks (session);
CREATE INDEX outbox_by_state ON outbox (state, created_at);
CREATE INDEX upload_parts_by_upload ON upload_parts (upload_id, serial);
CREATE INDEX extents_by_task ON extents (task_id, epoch, segment);
COMMIT;
