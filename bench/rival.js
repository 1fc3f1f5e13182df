// The server that many would build in Node: `ws` and better-sqlite3, with the framing and the acks of Ringo Exp.
// peers.py measures it.
//
// All messages of one turn of the event loop, from all clients, go into one transaction. Then each client gets one ack
// with the number of its stored records.
const database = new (require('better-sqlite3'))('peer.db');
database.pragma('journal_mode = WAL');
database.pragma('synchronous = FULL');
database.exec('CREATE TABLE record(id INTEGER PRIMARY KEY, value INTEGER NOT NULL)');
const ROWS_A_STATEMENT = 256;
const one = database.prepare('INSERT INTO record(value) VALUES (?)');
const many = database.prepare('INSERT INTO record(value) VALUES ' + Array(ROWS_A_STATEMENT).fill('(?)').join());
const store = database.transaction(values => {
  let i = 0;
  for (; i + ROWS_A_STATEMENT <= values.length; i += ROWS_A_STATEMENT) many.run(values.slice(i, i + ROWS_A_STATEMENT));
  for (; i < values.length; i++) one.run(values[i]);
});

let values = [];
const senders = new Set(); // clients with values that are not stored yet
let scheduled = false;

function commit() {
  scheduled = false;
  store(values);
  values = [];
  for (const client of senders) {
    client.stored += client.gathered;
    client.gathered = 0;
    const ack = Buffer.alloc(8);
    ack.writeBigUInt64BE(BigInt(client.stored));
    client.send(ack);
  }
  senders.clear();
}

const server = new (require('ws').Server)({port: 0, host: '127.0.0.1', perMessageDeflate: false, backlog: 1024});
server.on('listening', () => console.log(server.address().port));
server.on('connection', client => {
  client.stored = client.gathered = 0;
  client.on('message', data => {
    values.push(data.readInt32BE(0));
    client.gathered++;
    senders.add(client);
    if (!scheduled) {
      scheduled = true;
      setImmediate(commit);
    }
  });
});
